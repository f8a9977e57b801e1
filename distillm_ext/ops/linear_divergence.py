"""Operator `linear_divergence`: typed call, fake, autograd. The computation: `linear_chunks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .divergence import loss_dtype, refuse_second_derivative, scaled_gradient
from .linear_call import LinearDivergenceCall
from .linear_chunks import linear_divergence_cpu, linear_divergence_cuda
from .linear_gradients import common_weight, stored_dtype

_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? ids, Tensor? logprobs, Tensor? log_norm, Tensor? tail_logprob, Tensor? counts, "
    "Tensor? labels, Tensor? row_weight, Tensor? alpha_rows, Tensor? cap, Tensor? rows, float scale, float softcap, "
    "float teacher_scale, float teacher_softcap, str divergence, float alpha, float beta, float temperature, "
    "float ce_weight, int ignore_index, bool detach_mixture, str tail, SymInt teacher_vocab, ScalarType dtype, "
    "SymInt chunk_rows, SymInt vocab_size, bool per_row, bool need_ce, bool need_metrics, bool need_hidden, "
    "bool need_weight, bool need_bias) -> "
    "(Tensor loss, Tensor ce, Tensor metrics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_NAME = "distillm_ext::linear_divergence"


def linear_divergence(call: LinearDivergenceCall) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, [] or with `per_row` [R], differentiable in hidden, weight and bias; cross-entropy likewise; metrics.

    Row r is weight_r (min(divergence_r, cap_r) + ce_weight CE_r). Rows with an ignored label or weight 0, and with
    `rows` all that are not listed, are exactly 0. The cross-entropy, weight_r CE_r, is 0 unless asked for. The
    metrics are those of `divergence`, [R, 3], or [0] unless asked for.
    """
    common = None if call.row_weight is None else common_weight(call.row_weight, call.dtype)
    if common is None or call.row_weight is None:
        return torch.ops.distillm_ext.linear_divergence(*call)[:3]
    relative = call._replace(row_weight=call.row_weight / common)
    loss, ce, metrics = torch.ops.distillm_ext.linear_divergence(*relative)[:3]
    return loss * common, ce * common, metrics


def _linear_divergence_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = LinearDivergenceCall(*arguments)
    wide = loss_dtype(call.dtype)
    loss = call.hidden.new_empty((call.hidden.shape[0],) if call.per_row else (), dtype=wide)

    def gradient(x: Tensor, needed: bool, dtype: torch.dtype) -> Tensor:
        return x.new_empty(x.shape if needed and not call.per_row else (0,), dtype=dtype)

    bias = call.weight if call.bias is None else call.bias

    return (
        loss,
        torch.empty_like(loss),
        call.hidden.new_empty((call.hidden.shape[0], 3) if call.need_metrics else (0,), dtype=wide),
        gradient(call.hidden, call.need_hidden, call.hidden.dtype),
        gradient(call.weight, call.need_weight, stored_dtype(call.weight.dtype)),
        gradient(bias, call.need_bias, stored_dtype(bias.dtype)),
    )


# Fields before this one are tensors.
_TENSORS = LinearDivergenceCall._fields.index("scale")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = LinearDivergenceCall(*inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.rest = inputs[_TENSORS:]
    ctx.per_row = call.per_row
    ctx.needed = (call.need_hidden, call.need_weight, call.need_bias)
    ctx.dtypes = tuple(x.dtype if x is not None else None for x in (call.hidden, call.weight, call.bias))
    ctx.save_for_backward(*(call[:_TENSORS] if call.per_row else output[3:]))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(LinearDivergenceCall._fields) - 3)
    if grad_loss is None:
        return (None, None, None, *nothing)
    refuse_second_derivative()
    gradients = ctx.saved_tensors
    if ctx.per_row:
        call = LinearDivergenceCall(*gradients, *ctx.rest)
        row_weight = grad_loss if call.row_weight is None else call.row_weight * grad_loss
        grad_loss = common_weight(row_weight, call.dtype)
        row_weight = (row_weight if grad_loss is None else row_weight / grad_loss).contiguous()
        again = call._replace(row_weight=row_weight, per_row=False, need_ce=False, need_metrics=False)
        gradients = torch.ops.distillm_ext.linear_divergence(*again)[3:]
    found = (
        (gradient if grad_loss is None else _times(gradient, grad_loss)).to(dtype) if need else None
        for gradient, need, dtype in zip(gradients, ctx.needed, ctx.dtypes, strict=True)
    )
    return (*found, *nothing)


def _times(gradient: Tensor, scale: Tensor) -> Tensor:
    """The saved gradient times the scalar upstream gradient; by 1 it is not touched."""
    rows = gradient.unsqueeze(-1) if gradient.dim() == 1 else gradient
    factor = scale.to(loss_dtype(gradient.dtype)).expand(rows.shape[0]).contiguous()
    scaled = scaled_gradient(rows, factor)
    return scaled.squeeze(-1) if gradient.dim() == 1 else scaled


torch.library.define(_NAME, _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.impl(_NAME, "cpu", linear_divergence_cpu)
torch.library.impl(_NAME, "cuda", linear_divergence_cuda)
torch.library.register_fake(_NAME, _linear_divergence_fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context)
