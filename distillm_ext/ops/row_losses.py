"""Losses of rows of logits, by the operator of the teacher at hand: dense or compressed, beside the logits or in place.

This is the one place where the kind of teacher decides on the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .divergence import DivergenceOptions, RowSides, divergence, divergence_, refuse_second_derivative
from .sparse_divergence import CompressedRows, sparse_divergence, sparse_divergence_


def row_losses(
    student: Tensor,
    teacher: Tensor | CompressedRows,
    sides: RowSides,
    options: DivergenceOptions,
    *,
    vocab_size: int = 0,
    need_metrics: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses [R] and metrics [R, 3] (or [0]) of student [R, V] or [B, S, V]; see `ops.divergence.divergence`.

    Differentiable in `student`. A compressed teacher has no metrics. With `inplace` the gradient is written over
    `student`, which must have stride 1 along the vocabulary, in eager mode only; whatever saved the logits for its own
    backward pass (a soft-cap, say) is told by autograd that they are gone.
    """
    if inplace:

        def operator(logits: Tensor) -> tuple[Tensor, Tensor]:
            return row_losses_(logits, teacher, sides, options, vocab_size=vocab_size, need_metrics=need_metrics)

        return _InPlace.apply(student, operator)
    if isinstance(teacher, CompressedRows):
        loss = sparse_divergence(student, teacher, sides, options, vocab_size=vocab_size)
        return loss, loss.new_empty(0)
    return divergence(student, teacher, sides, options, vocab_size=vocab_size, need_metrics=need_metrics)


def row_losses_(
    student: Tensor,
    teacher: Tensor | CompressedRows,
    sides: RowSides,
    options: DivergenceOptions,
    *,
    vocab_size: int = 0,
    need_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `row_losses`; the gradient of the sum of the losses takes the place of `student`. Unknown to autograd."""
    if isinstance(teacher, CompressedRows):
        loss = sparse_divergence_(student, teacher, sides, options, vocab_size=vocab_size)
        return loss, loss.new_empty(0)
    return divergence_(student, teacher, sides, options, vocab_size=vocab_size, need_metrics=need_metrics)


class _InPlace(torch.autograd.Function):
    """Backward hands on the memory of the logits, which holds the gradient since the forward pass.

    The operator runs on a detached alias. It shares the version counter of the logits, so that autograd notices when
    another backward pass needs what has been overwritten; and it is saved after the operator ran, so that autograd
    notices when somebody changes the gradient before it is used. Marking the logits as changed instead would rebase
    the history of the tensors that they are a view of, and cost a copy there.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, operator: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        gradient = student.detach()
        loss, metrics = operator(gradient)
        torch.autograd.graph.increment_version(gradient)  # operators of the stable ABI leave that to the caller
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics)
        ctx.save_for_backward(gradient)
        ctx.used = False
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        if grad_loss is None:
            return None, None
        refuse_second_derivative()
        if ctx.used:
            raise RuntimeError(
                "the backward pass of a loss with inplace=True runs once: its gradient is handed on, not kept; use "
                "inplace=False to call backward again."
            )
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        torch.ops.distillm_ext.scale_rows_(gradient, grad_loss.contiguous())
        return gradient, None
