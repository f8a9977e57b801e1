"""Operators `sparse_divergence` and, in place, `sparse_divergence_`: typed calls, fakes, autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergence import DivergenceOptions, RowSides, register_row_gradient, row_outputs


class CompressedRows(NamedTuple):
    """A compressed teacher as the operators take it: R rows of K entries, in the loss's dtype, at its temperature."""

    ids: Tensor  # [R, K] int32
    logprobs: Tensor  # [R, K], at T = 1
    log_norm: Tensor  # [R]
    tail_logprob: Tensor  # [R]
    counts: Tensor | None  # [R, K] int32, for tail "sampled"
    tail: str
    vocab_size: int


def sparse_divergence(
    student: Tensor, teacher: CompressedRows, sides: RowSides, options: DivergenceOptions, *, vocab_size: int = 0
) -> Tensor:
    """Losses [R] of student [R, V] or [B, S, V] (R = B S) against a compressed teacher, differentiable in `student`.

    Rows, masks and gradients as in `ops.divergence.divergence`.
    """
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    arguments = _arguments(teacher, sides, options, vocab_size)
    return torch.ops.distillm_ext.sparse_divergence(student, *arguments, need_gradient)[0]


def sparse_divergence_(
    student: Tensor, teacher: CompressedRows, sides: RowSides, options: DivergenceOptions, *, vocab_size: int = 0
) -> Tensor:
    """As `sparse_divergence`, in place as in `ops.divergence.divergence_`."""
    return torch.ops.distillm_ext.sparse_divergence_(student, *_arguments(teacher, sides, options, vocab_size))


def _arguments(
    teacher: CompressedRows, sides: RowSides, options: DivergenceOptions, vocab_size: int
) -> tuple[Any, ...]:
    """What both operators take after the student, in the order of their schemas."""
    *tensors, tail, teacher_vocab = teacher
    divergence, *others = options
    return (*tensors, *sides, divergence, tail, *others, vocab_size, teacher_vocab)


@torch.library.register_fake("distillm_ext::sparse_divergence")
def _sparse_divergence_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss, _ = row_outputs(student, need_metrics=False)
    return loss, student.new_empty(student.shape if arguments[-1] else (0,))


@torch.library.register_fake("distillm_ext::sparse_divergence_")
def _sparse_divergence_inplace_fake(student: Tensor, *arguments: Any) -> Tensor:
    return row_outputs(student, need_metrics=False)[0]


register_row_gradient("sparse_divergence")
