"""Our operators against the copy of this card: value and gradient together, the cases that matter most first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distillm_ext import compress_logits, distillation_loss, sample_tokens

from .. import clock
from ..inputs import DTYPES, clipped, figures, logits, pairs, with_gradient
from ..operators import cross_entropy, labels_of
from ..stage import Case, Check

VOCABULARIES = (128256, 50257, 151936, 32000)
ROWS = (8192, 256)
TOY_VOCABULARIES, TOY_ROWS = (1001,), (16,)
# Divergence, and the standard deviation of the logits: on flat rows thousands of entries are the head of adaptive_kl.
MEMBERS = (("skew_kl", 3.0), ("forward_kl", 3.0), ("generalized_js", 3.0), ("adaptive_kl", 3.0), ("adaptive_kl", 1.0))
K = 64
SAMPLED_ROWS = (8, 64, 256)


def _sizes(check: Check) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (VOCABULARIES, ROWS) if check.cuda else (TOY_VOCABULARIES, TOY_ROWS)


def divergence(
    check: Check, rows: int, vocab: int, dtype: str, name: str, spread: float, metrics: bool
) -> dict[str, Any]:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        found = distillation_loss(student, teacher, divergence=name, return_metrics=metrics)
        return found[0] if metrics else found

    sides = pairs(check, rows, vocab, dtype, spread=spread)
    taken = clock.milliseconds([with_gradient(loss, *pair) for pair in sides], check.device)
    return figures(check, taken, 3 * rows * vocab * DTYPES[dtype].itemsize)


def in_place(check: Check, rows: int, vocab: int, dtype: str) -> dict[str, Any]:
    """After the first round the logits are their gradient: the same work on other numbers."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return distillation_loss(student.view_as(student), teacher, inplace=True)

    calls = [with_gradient(loss, *pair) for pair in pairs(check, rows, vocab, dtype)]
    taken = clock.milliseconds(calls, check.device)
    return figures(check, taken, 3 * rows * vocab * DTYPES[dtype].itemsize)


def alone(check: Check, rows: int, vocab: int, dtype: str) -> dict[str, Any]:
    """Cross-entropy without a teacher, which reads one side."""

    def loss(student: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(student, labels).sum()

    calls = [with_gradient(loss, student, labels_of(student)) for student, _ in pairs(check, rows, vocab, dtype)]
    return figures(check, clock.milliseconds(calls, check.device), 2 * rows * vocab * DTYPES[dtype].itemsize)


def shifted(check: Check, rows: int, vocab: int, dtype: str) -> dict[str, Any]:
    """`logits[:, :-1]` of sequences: at an odd vocabulary most rows begin off the 16 bytes of a load."""
    sequences = rows // 512 or 1
    calls = []
    for student, teacher in pairs(check, rows, vocab, dtype):
        cut, target = (side.detach().view(sequences, -1, vocab)[:, :-1] for side in (student, teacher))
        calls.append(with_gradient(distillation_loss, cut.requires_grad_(), target))
    counted = sequences * (rows // sequences - 1)
    taken = clock.milliseconds(calls, check.device)
    return figures(check, taken, 3 * counted * vocab * DTYPES[dtype].itemsize)


def one_side(check: Check, rows: int, vocab: int, dtype: str, call: Callable[[Tensor], Any]) -> dict[str, Any]:
    """A call that reads logits once."""
    moved = rows * vocab * DTYPES[dtype].itemsize
    sets = [logits(check, rows, vocab, dtype, seed=i) for i in range(clock.input_sets(moved, check.device))]
    taken = clock.milliseconds([partial(call, side) for side in sets], check.device)
    return figures(check, taken, moved)


def topk_and_logsumexp(side: Tensor) -> tuple[Any, Tensor]:
    """What a compressed teacher takes without our kernel; it gives no tail and no order among equals."""
    return torch.topk(side, K), torch.logsumexp(side, -1)


def draw(side: Tensor, **rule: float) -> Any:
    return sample_tokens(side, seed=1, position=0, **rule)


def sparse(check: Check, rows: int, vocab: int, dtype: str) -> dict[str, Any]:
    """The student's row is read and its gradient written; the compressed teacher hardly weighs."""
    moved = 2 * rows * vocab * DTYPES[dtype].itemsize
    calls = []
    for i in range(clock.input_sets(moved, check.device)):
        student = logits(check, rows, vocab, dtype, seed=2 * i).requires_grad_()
        target = compress_logits(logits(check, rows, vocab, dtype, seed=2 * i + 1), K)
        calls.append(lambda student=student, target=target: torch.autograd.grad(
            distillation_loss(student, target), student))  # fmt: skip
    return figures(check, clock.milliseconds(calls, check.device), moved)


def scaled(check: Check, rows: int, vocab: int, dtype: str) -> dict[str, Any]:
    """Two thirds more than the loss with a unit upstream gradient: the gradient is read and written again."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return 3 * distillation_loss(student, teacher)

    calls = [with_gradient(loss, *pair) for pair in pairs(check, rows, vocab, dtype)]
    taken = clock.milliseconds(calls, check.device)
    return figures(check, taken, 5 * rows * vocab * DTYPES[dtype].itemsize)


def divergences(check: Check) -> Iterator[Case]:
    vocabularies, all_rows = _sizes(check)
    for rows in all_rows:
        for metrics in (False, True):
            for dtype in ("bfloat16", "float32"):
                for name, spread in MEMBERS:
                    for vocab in vocabularies:
                        title = f"{name} {dtype} {rows} x {vocab}"
                        title += f" spread {spread:g}" if spread != 3 else ""
                        title += " metrics" if metrics else ""
                        yield title, partial(divergence, check, rows, vocab, dtype, name, spread, metrics)


def others(check: Check) -> Iterator[Case]:
    vocabularies, all_rows = _sizes(check)
    rows, dtype = all_rows[0], "bfloat16"
    both: tuple[tuple[str, Callable[..., dict[str, Any]]], ...] = (
        ("cross-entropy", alone), ("logits[:, :-1]", shifted), ("in place", in_place), ("sparse_divergence", sparse),
        ("scale_rows", scaled), ("topk_logits", partial(one_side, call=partial(compress_logits, k=K))),
        ("torch.topk + logsumexp", partial(one_side, call=topk_and_logsumexp)),
    )  # fmt: skip
    for name, measure in both:
        for vocab in vocabularies[:3]:
            yield f"{name} {dtype} {rows} x {vocab}", partial(measure, check, rows, vocab, dtype)
    vocab = 151936 if check.cuda else 1001
    for rows in SAMPLED_ROWS if check.cuda else (4,):
        for title, rule in (("", {}), (" top_k 50 top_p 0.9", {"top_k": 50, "top_p": 0.9})):
            call = partial(draw, **rule)
            yield f"sample_tokens {rows} x {vocab}{title}", partial(one_side, check, rows, vocab, "float32", call)


def run(check: Check) -> None:
    """First what the estimates in the documentation speak of, then the rest of each kind."""
    first = divergences(check)
    head = [next(first) for _ in range(len(_sizes(check)[0]) * 2)]
    every = [*head, *others(check), *first]
    check.cases((name, clipped(measure, check)) for name, measure in every)
