"""Operators `divergence`, in place `divergence_`, and `scale_rows_`: options, typed calls, fakes, autograd."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import extension  # noqa: F401  (loads the libraries)


class DivergenceOptions(NamedTuple):
    """The hyper-parameters of a loss, from the objective to the operators.

    The fields are arguments of the operators, in the order of their schemas. `checks.options.checked_options` makes one
    of what a user passes; `functional` documents them.
    """

    divergence: str
    alpha: float = 0.0
    beta: float = 0.0
    temperature: float = 1.0
    ce_weight: float = 0.0
    ignore_index: int = -100
    detach_mixture: bool = False


# Cross-entropy alone, by the same kernel: beside a cap of 0 the divergence adds nothing, to the gradient neither.
CROSS_ENTROPY = DivergenceOptions("total_variation", ce_weight=1.0)


class RowSides(NamedTuple):
    """The side inputs of the rows, [R] each. The fields are arguments of the operators, in the order of their schemas.

    weight, alpha_rows and cap have the dtype of the losses.
    """

    labels: Tensor | None = None  # int64
    weight: Tensor | None = None  # the division of "mean" included
    alpha_rows: Tensor | None = None
    cap: Tensor | None = None


def row_count(shape: torch.Size) -> int:
    """How many positions there are; `Size.numel` would make constants of a compiler's symbolic sizes."""
    return math.prod(shape)


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of per-row inputs: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def divergence(
    student: Tensor,
    teacher: Tensor,
    sides: RowSides,
    options: DivergenceOptions,
    *,
    vocab_size: int = 0,
    need_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses [R] of student [R, Vs] or [B, S, Vs] (R = B S) against teacher, likewise; metrics [R, 3] or [0].

    Differentiable in `student`. Row r is weight_r (min(divergence_r, cap_r) + ce_weight CE_r); rows with an ignored
    label or weight 0 are exactly 0 and are not read. Value and gradient come from one kernel call; no gradient is
    formed when none is needed. `vocab_size`: entries of both sides to use, 0 for all. The metrics are teacher entropy,
    student entropy (nats, at the temperature) and top-1 agreement.
    """
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    loss, _, metrics = torch.ops.distillm_ext.divergence(
        student, teacher, *sides, *options, vocab_size, need_gradient, need_metrics
    )
    return loss, metrics


def divergence_(
    student: Tensor,
    teacher: Tensor,
    sides: RowSides,
    options: DivergenceOptions,
    *,
    vocab_size: int = 0,
    need_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `divergence`; the gradient of the sum of the losses takes the place of `student`. Unknown to autograd.

    `student` must have stride 1 along the vocabulary.
    """
    return torch.ops.distillm_ext.divergence_(student, teacher, *sides, *options, vocab_size, need_metrics)


def row_outputs(student: Tensor, need_metrics: bool) -> tuple[Tensor, Tensor]:
    """Empty losses and metrics of the shapes and dtypes that the operators return."""
    rows, dtype = row_count(student.shape[:-1]), loss_dtype(student.dtype)
    return student.new_empty((rows,), dtype=dtype), student.new_empty((rows, 3) if need_metrics else (0,), dtype=dtype)


@torch.library.register_fake("distillm_ext::divergence")
def _divergence_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_gradient, need_metrics = arguments[-2:]
    loss, metrics = row_outputs(student, need_metrics)
    return loss, student.new_empty(student.shape if need_gradient else (0,)), metrics


@torch.library.register_fake("distillm_ext::divergence_")
def _divergence_in_place_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return row_outputs(student, need_metrics=arguments[-1])


@torch.library.register_fake("distillm_ext::scale_rows_")
def _scale_rows_fake(gradient: Tensor, scale: Tensor) -> None:
    return None


def scaled_gradient(gradient: Tensor, scale: Tensor) -> Tensor:
    """Row r of the saved gradient times scale[r].

    In place, where the backward pass frees what it saved: the kernel skips rows whose factor is exactly 1, so that a
    unit upstream gradient costs no pass and no synchronisation. A traced graph must not mutate what it saved; there the
    product is left to the compiler, which fuses it.
    """
    if type(gradient) is not Tensor:
        return (gradient * scale.view(*gradient.shape[:-1], 1)).to(gradient.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    torch.ops.distillm_ext.scale_rows_(gradient, scale)
    return gradient


def refuse_second_derivative() -> None:
    """To be called in every backward."""
    if torch.is_grad_enabled():
        raise RuntimeError("distillm_ext losses have no second derivative; call backward without create_graph=True.")


def register_row_gradient(name: str) -> None:
    """Autograd of an operator (student, …, need_gradient, …) → (losses [R], their gradient by the student or [0], …).

    The backward pass scales the rows of that gradient; no other input gets one, and no other output passes one on.
    """
    arguments = [argument.name for argument in getattr(torch.ops.distillm_ext, name).default._schema.arguments]
    place, nothing = arguments.index("need_gradient"), (None,) * (len(arguments) - 1)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.need_gradient = inputs[place]
        if ctx.need_gradient:
            ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None, *nothing)
        if not ctx.need_gradient:
            raise RuntimeError(f"distillm_ext::{name} was called with need_gradient=False; call it with True to train.")
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return (scaled_gradient(gradient, grad_loss), *nothing)

    torch.library.register_autograd(f"distillm_ext::{name}", backward, setup_context=setup_context)


register_row_gradient("divergence")
