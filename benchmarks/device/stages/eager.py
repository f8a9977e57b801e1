"""The plain formula in PyTorch beside ours, and Liger's kernels where they are installed: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import baselines
import peers
import torch
from torch import Tensor

from distillm_ext import distillation_loss

from .. import clock
from ..inputs import clipped, logits, with_gradient
from ..stage import Case, Check, Skipped

ROWS, VOCABULARIES = 4096, (50257, 128256)
TOY_ROWS, TOY_VOCABULARIES = 16, (1001,)
ROUNDS = 5
Loss = Callable[[Tensor, Tensor], Tensor]


def sizes(check: Check) -> Iterator[tuple[int, int]]:
    """(rows, vocabulary)"""
    rows, vocabularies = (ROWS, VOCABULARIES) if check.cuda else (TOY_ROWS, TOY_VOCABULARIES)
    return ((rows, vocab) for vocab in vocabularies)


def formula(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    return baselines.loss(name, student, teacher)


def ours(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    return distillation_loss(student, teacher, divergence=name)


def liger(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    loss = peers.liger(name, teacher)
    if loss is None:
        raise Skipped("liger_kernel is not installed, or this is no GPU")
    return loss(student)


def measured(check: Check, rows: int, vocab: int, loss: Loss) -> dict[str, Any]:
    """One pair of logits is far beyond any cache here."""
    student = logits(check, rows, vocab, "bfloat16").requires_grad_()
    call = with_gradient(loss, student, logits(check, rows, vocab, "bfloat16", seed=1))
    call()
    if check.cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    ms, how = clock.milliseconds([call], check.device, rounds=ROUNDS, warm_ups=1, graph=False)
    peak = {"peak GiB": (torch.cuda.max_memory_allocated() - before) / 2**30} if check.cuda else {}
    return {"ms": ms, **peak, "how": how}


CANDIDATES = (
    ("ours", ours, ("skew_kl", "forward_kl", "generalized_js")),
    ("eager", formula, ("skew_kl", "forward_kl")),
    ("liger", liger, ("forward_kl", "generalized_js")),
)


def cases(check: Check) -> Iterator[Case]:
    for rows, vocab in sizes(check):
        for title, loss, names in CANDIDATES:
            for name in names:
                case = partial(measured, check, rows, vocab, partial(loss, name))
                yield f"{title} {name} {rows} x {vocab}", clipped(case, check)


def run(check: Check) -> None:
    check.cases(cases(check))
