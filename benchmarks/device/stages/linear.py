"""The loss through a head: bare products, ours by memory budget, materialised; and what would make it cheaper."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distillm_ext import TeacherHead, distillation_loss, linear_distillation_loss

from .. import clock
from ..inputs import clipped
from ..stage import Case, Check, Skipped

# (vocabulary, hidden size, the teacher's): a large head, a small student of a large vocabulary, an odd vocabulary.
SHAPES, ROWS = ((128256, 4096, 4096), (151936, 896, 3584), (50257, 768, 1600)), 8192
TOY_SHAPES, TOY_ROWS = ((1001, 32, 48),), 64
BUDGETS_MIB = (256, 1024, 2048, 4096)
PADDED = 64
ROUNDS = 7


def _sizes(check: Check) -> tuple[tuple[tuple[int, int, int], ...], int]:
    return (SHAPES, ROWS) if check.cuda else (TOY_SHAPES, TOY_ROWS)


def _random(check: Check, *shape: int) -> Tensor:
    return torch.randn(shape, device=check.device).mul_(0.05).to(torch.bfloat16)


def _taken(check: Check, call: clock.Call) -> dict[str, Any]:
    ms, how = clock.milliseconds([call], check.device, rounds=ROUNDS, graph=False)
    return {"ms": ms, "how": how}


def bare(check: Check, vocab: int, hidden: int, teacher_hidden: int) -> dict[str, Any]:
    """The four products, with logits of both sides whole; no loss."""
    rows = _sizes(check)[1]
    states, weight = _random(check, rows, hidden), _random(check, vocab, hidden)
    teacher, teacher_weight = _random(check, rows, teacher_hidden), _random(check, vocab, teacher_hidden)

    def products() -> tuple[Tensor, ...]:
        student_logits = states @ weight.t()
        return student_logits @ weight, student_logits.t() @ states, teacher @ teacher_weight.t()

    found = _taken(check, products)
    return {**found, "TFLOP/s": rows * vocab * (6 * hidden + 2 * teacher_hidden) / found["ms"] / 1e9}


def ours(check: Check, vocab: int, hidden: int, teacher_hidden: int, budget: int | None) -> dict[str, Any]:
    """Chunks for a budget in MiB of both sides' logits; None: logits whole, then the loss."""
    rows = _sizes(check)[1]
    states, weight = (_random(check, n, hidden).requires_grad_() for n in (rows, vocab))
    teacher = TeacherHead(_random(check, rows, teacher_hidden), _random(check, vocab, teacher_hidden))
    chunk = 0 if budget is None else min(rows, max(1, budget * 2**20 // (2 * vocab * 2)))

    def loss() -> Tensor:
        if not chunk:
            return distillation_loss(states @ weight.t(), teacher.hidden @ teacher.weight.t())
        return linear_distillation_loss(states, weight, teacher, chunk_rows=chunk)

    found = _taken(check, lambda: torch.autograd.grad(loss(), (states, weight)))
    return {**found, **({"rows of a chunk": chunk} if chunk else {})}


def weight_gradient(check: Check, vocab: int, hidden: int, rows: int, in_place: bool) -> dict[str, Any]:
    """A chunk's part of the gradient of the weight, summed in float32: as it is done, and by one call in place."""
    if not check.cuda:
        raise Skipped("needs a CUDA device")
    gradient, states = _random(check, rows, vocab), _random(check, rows, hidden)
    total = torch.zeros(vocab, hidden, device=check.device)

    def product_and_sum() -> None:
        total.add_(torch.mm(gradient.t(), states, out_dtype=torch.float32), alpha=0.5)

    def one_call() -> None:
        torch.addmm(total, gradient.t(), states, out_dtype=torch.float32, alpha=0.5, out=total)

    return _taken(check, one_call if in_place else product_and_sum)


def product(check: Check, vocab: int, hidden: int, stride: int) -> dict[str, Any]:
    """Logits of an odd vocabulary in rows of their own length, and in rows padded to a multiple of 64 entries."""
    rows = _sizes(check)[1]
    states, weight = _random(check, rows, hidden), _random(check, vocab, hidden)
    out = torch.empty(rows, stride, device=check.device, dtype=torch.bfloat16)[:, :vocab]
    return _taken(check, lambda: torch.mm(states, weight.t(), out=out))


def cases(check: Check) -> Iterator[Case]:
    shapes, rows = _sizes(check)
    for vocab, hidden, teacher_hidden in shapes:
        title, shape = f"V {vocab} H {hidden} Ht {teacher_hidden}", (vocab, hidden, teacher_hidden)
        yield f"bare products {title}", partial(bare, check, *shape)
        for budget in BUDGETS_MIB:
            yield f"ours {budget} MiB {title}", partial(ours, check, *shape, budget)
        yield f"materialised {title}", partial(ours, check, *shape, None)
    vocab, hidden, _ = shapes[0]
    for chunk in (512, 2048) if check.cuda else (8,):
        for in_place in (False, True):
            title = f"weight gradient {'in one call' if in_place else 'in two'}, {chunk} rows"
            yield f"{title} V {vocab} H {hidden}", partial(weight_gradient, check, vocab, hidden, chunk, in_place)
    vocab, hidden, _ = shapes[-1]
    for stride in (vocab, -(-vocab // PADDED) * PADDED):
        yield f"logits {rows} x {vocab} in rows of {stride}", partial(product, check, vocab, hidden, stride)


def run(check: Check) -> None:
    check.cases((name, clipped(measure, check)) for name, measure in cases(check))
