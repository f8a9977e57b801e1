"""Operator `topk_logits`: typed call and fake. It has no gradient: a teacher is not trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import extension  # noqa: F401  (loads the libraries)
from .divergence import loss_dtype


class TopkLogits(NamedTuple):
    """What `CompressedLogits` holds, for logits [R, V]; the part of absent labels or positions is empty."""

    ids: Tensor  # [R, k] int32
    logprobs: Tensor  # [R, k]
    log_norm: Tensor  # [R, T]
    tail_logprob: Tensor  # [R, T]
    label_logprob: Tensor  # [R] or [0]
    valid: Tensor  # [R] bool
    counts: Tensor  # [R, k] or [0, k] int32


def topk_logits(
    logits: Tensor, labels: Tensor | None, position: Tensor | None, k: int, temperatures: tuple[float, ...], seed: int
) -> TopkLogits:
    """The k most probable entries of each row of logits [R, V]; with `position` [R], k draws by systematic sampling."""
    found = torch.ops.distillm_ext.topk_logits(logits.detach(), labels, position, k, list(temperatures), seed)
    return TopkLogits(*found)


@torch.library.register_fake("distillm_ext::topk_logits")
def _topk_logits_fake(
    logits: Tensor, labels: Tensor | None, position: Tensor | None, k: int, temperatures: list[float], seed: int
) -> tuple[Tensor, ...]:
    rows, real = logits.shape[0], loss_dtype(logits.dtype)
    return (
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=real),
        logits.new_empty((rows, len(temperatures)), dtype=real),
        logits.new_empty((rows, len(temperatures)), dtype=real),
        logits.new_empty((0 if labels is None else rows,), dtype=real),
        logits.new_empty((rows,), dtype=torch.bool),
        logits.new_empty((0 if position is None else rows, k), dtype=torch.int32),
    )
