"""Operator `linear_divergence`: typed call, fake, autograd. The computation: `chunks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergence import loss_dtype, refuse_second_derivative, scaled_gradient
from .call import LinearDivergenceCall, flatten, schema_arguments, unflatten
from .chunks import compute_cpu, compute_cuda
from .gradients import common_weight, stored_dtype

_NAME = "distillm_ext::linear_divergence"
_RESULTS = "(Tensor loss, Tensor ce, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"


def linear_divergence(call: LinearDivergenceCall) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, [] or with `per_row` [R], differentiable in hidden, weight and bias; cross-entropy likewise; metrics.

    Row r is weight_r (min(divergence_r, cap_r) + ce_weight CE_r). Rows with an ignored label or weight 0, and with
    `rows` all that are not listed, are exactly 0. The cross-entropy, weight_r CE_r, is 0 unless asked for. The
    metrics are those of `divergence`, [R, 3], or [0] unless asked for.
    """
    weight = call.sides.weight
    common = None if weight is None else common_weight(weight, call.dtype)
    if weight is not None and common is not None:
        call = call._replace(sides=call.sides._replace(weight=weight / common))
    loss, ce, metrics, *_ = torch.ops.distillm_ext.linear_divergence(*flatten(call))
    return (loss, ce, metrics) if common is None else (loss * common, ce * common, metrics)


def _linear_divergence_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    return compute_cpu(unflatten(arguments))


def _linear_divergence_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    return compute_cuda(unflatten(arguments))


def _linear_divergence_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = unflatten(arguments)
    hidden, weight, bias = call.student[:3]
    bias = weight if bias is None else bias
    wide = loss_dtype(call.dtype)
    loss = hidden.new_empty((hidden.shape[0],) if call.per_row else (), dtype=wide)

    def gradient(x: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
        return x.new_empty(x.shape if needed and not call.per_row else (0,), dtype=dtype)

    return (
        loss,
        torch.empty_like(loss),
        hidden.new_empty((hidden.shape[0], 3) if call.need_metrics else (0,), dtype=wide),
        gradient(hidden, call.need_hidden, hidden.dtype),
        gradient(weight, call.need_weight, stored_dtype(weight.dtype)),
        gradient(bias, call.need_bias, stored_dtype(bias.dtype)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = unflatten(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.per_row, ctx.count = call.per_row, len(inputs)
    if call.per_row:
        ctx.scalars = tuple(None if isinstance(x, Tensor) else x for x in inputs)
    ctx.needed = (call.need_hidden, call.need_weight, call.need_bias)
    ctx.dtypes = tuple(None if x is None else x.dtype for x in call.student[:3])
    saved = (x if isinstance(x, Tensor) else None for x in inputs) if call.per_row else output[3:]
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * ctx.count
    if grad_loss is None:
        return nothing
    refuse_second_derivative()
    gradients = ctx.saved_tensors
    if ctx.per_row:
        tensors = zip(gradients, ctx.scalars, strict=True)
        call = unflatten([scalar if tensor is None else tensor for tensor, scalar in tensors])
        gradients, grad_loss = _gradients_by_row(call, grad_loss)
    found = (
        (gradient if grad_loss is None else _times(gradient, grad_loss)).to(dtype) if need else None
        for gradient, need, dtype in zip(gradients, ctx.needed, ctx.dtypes, strict=True)
    )
    return *found, *nothing[len(ctx.needed) :]


def _gradients_by_row(call: LinearDivergenceCall, grad_loss: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Gradients of hidden, weight and bias for upstream gradients [R], up to a common factor, the second result."""
    weight = grad_loss if call.sides.weight is None else call.sides.weight * grad_loss
    common = common_weight(weight, call.dtype)
    weight = (weight if common is None else weight / common).contiguous()
    again = call._replace(sides=call.sides._replace(weight=weight), per_row=False, need_ce=False, need_metrics=False)
    return torch.ops.distillm_ext.linear_divergence(*flatten(again))[3:], common


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    """The saved gradient times the scalar upstream gradient; by 1 it is not touched."""
    rows = gradient.unsqueeze(-1) if gradient.dim() == 1 else gradient
    factor = scale.to(loss_dtype(gradient.dtype)).expand(rows.shape[0]).contiguous()
    scaled = scaled_gradient(rows, factor)
    return scaled.squeeze(-1) if gradient.dim() == 1 else scaled


torch.library.define(_NAME, f"({schema_arguments()}) -> {_RESULTS}", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl(_NAME, "cpu", _linear_divergence_cpu)
torch.library.impl(_NAME, "cuda", _linear_divergence_cuda)
torch.library.register_fake(_NAME, _linear_divergence_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
