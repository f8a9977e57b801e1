"""Operator `sparse_divergence`: typed call, fake, autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension  # noqa: F401  (loads the libraries)
from .divergence import DivergenceOptions, _scaled, loss_dtype


class CompressedRows(NamedTuple):
    """A compressed teacher as the operator takes it: R rows of K entries, in the loss's dtype, at its temperature."""

    ids: Tensor  # [R, K] int32
    logprobs: Tensor  # [R, K], at T = 1
    log_norm: Tensor  # [R]
    tail_logprob: Tensor  # [R]
    counts: Tensor | None  # [R, K] int32, for tail "sampled"
    vocab_size: int
    tail: str


def sparse_divergence(
    student: Tensor,
    teacher: CompressedRows,
    labels: Tensor | None,
    weight: Tensor | None,
    alpha_rows: Tensor | None,
    cap: Tensor | None,
    options: DivergenceOptions,
) -> Tensor:
    """Per-row losses [R] of student [R, V] or [B, S, V] against a compressed teacher, differentiable in `student`.

    Rows, masks and gradients as in `ops.divergence.divergence`.
    """
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    loss, _ = sparse_divergence_with_gradient(student, teacher, labels, weight, alpha_rows, cap, options, need_gradient)
    return loss


def sparse_divergence_with_gradient(
    student: Tensor,
    teacher: CompressedRows,
    labels: Tensor | None,
    weight: Tensor | None,
    alpha_rows: Tensor | None,
    cap: Tensor | None,
    options: DivergenceOptions,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [R] and the gradient, shaped like the student, of their sum, [0] when it is not needed."""
    return torch.ops.distillm_ext.sparse_divergence(
        student,
        teacher.ids,
        teacher.logprobs,
        teacher.log_norm,
        teacher.tail_logprob,
        teacher.counts,
        labels,
        weight,
        alpha_rows,
        cap,
        options.divergence,
        teacher.tail,
        options.alpha,
        options.beta,
        options.temperature,
        options.ce_weight,
        teacher.vocab_size,
        options.ignore_index,
        options.detach_mixture,
        need_gradient,
    )


@torch.library.register_fake("distillm_ext::sparse_divergence")
def _sparse_divergence_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    need_gradient = arguments[-1]
    loss = student.new_empty((student.shape[:-1].numel(),), dtype=loss_dtype(student.dtype))
    return loss, student.new_empty(student.shape if need_gradient else (0,))


_ARGUMENTS = 20


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gradient)
    ctx.need_gradient = inputs[-1]
    if ctx.need_gradient:
        ctx.save_for_backward(gradient)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (_ARGUMENTS - 1)
    if grad_loss is None:
        return (None, *nothing)
    if not ctx.need_gradient:
        raise RuntimeError(
            "distillm_ext::sparse_divergence was called with need_gradient=False; call it with True to train."
        )
    if torch.is_grad_enabled():
        raise RuntimeError("distillm_ext losses have no second derivative; call backward without create_graph=True.")
    (gradient,) = ctx.saved_tensors
    return (_scaled(gradient, grad_loss), *nothing)


torch.library.register_autograd("distillm_ext::sparse_divergence", _backward, setup_context=_setup_context)
