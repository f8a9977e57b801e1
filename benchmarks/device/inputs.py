"""Logits for measuring, and the figures that follow from a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import clock
from .stage import Check

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def logits(check: Check, rows: int, vocab: int, dtype: str, *, spread: float = 3.0, seed: int = 0) -> Tensor:
    """[rows, vocab], normal with standard deviation `spread`."""
    generator = torch.Generator(check.device).manual_seed(seed)
    made = torch.empty(rows, vocab, dtype=DTYPES[dtype], device=check.device)
    return made.normal_(0.0, spread, generator=generator)


def pairs(check: Check, rows: int, vocab: int, dtype: str, *, spread: float = 3.0) -> list[tuple[Tensor, Tensor]]:
    """As many pairs of student (which requires a gradient) and teacher as keep every call out of the cache."""
    sets = clock.input_sets(3 * rows * vocab * DTYPES[dtype].itemsize, check.device)
    return [
        (
            logits(check, rows, vocab, dtype, spread=spread, seed=2 * i).requires_grad_(),
            logits(check, rows, vocab, dtype, spread=spread, seed=2 * i + 1),
        )
        for i in range(sets)
    ]


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> clock.Call:
    return lambda: torch.autograd.grad(loss(student, teacher), student)


def copy_rate(check: Check) -> float | None:
    """TB/s of a copy on this card, where the stage `copy` has measured it."""
    rates = [r["TB/s"] for r in check.results("copy") if r.get("case") == "copy" and "TB/s" in r]
    return rates[-1] if rates else None


def figures(check: Check, taken: tuple[float, str], moved: int) -> dict[str, Any]:
    """Time, rate over the bytes that have to be moved, and its share of a copy's."""
    ms, how = taken
    rate, copy = moved / ms / 1e9, copy_rate(check)
    return {"ms": ms, "TB/s": rate, **({"share of copy": rate / copy} if copy else {}), "how": how}


def clipped(function: Callable[[], dict[str, Any]], check: Check) -> Callable[[], dict[str, Any]]:
    """The case, with the memory it took given back afterwards."""

    def measured() -> dict[str, Any]:
        found = function()
        if check.cuda:
            torch.cuda.empty_cache()
        return found

    return measured
