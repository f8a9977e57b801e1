"""What the losses take beside logits or heads and hyper-parameters, and how it becomes rows for the operators."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.divergence import DivergenceOptions, RowSides, loss_dtype, row_count
from .options import checked_number


class LossRequest(NamedTuple):
    """What is asked of a loss beside its hyper-parameters, as its caller passed it to `linear_distillation_loss`, which
    documents it, or to `distillation_loss`."""

    labels: Tensor | None = None
    weight: Tensor | None = None
    alpha: float | Tensor | None = None  # only a tensor counts here, a number in the `DivergenceOptions`
    cap: float | Tensor | None = None
    reduction: str = "mean"
    num_items: int | Tensor | None = None
    vocab_size: int | None = None
    tail: str = "bucket"
    return_metrics: bool = False
    rows: Tensor | None = None  # of heads alone


def row_sides(request: LossRequest, options: DivergenceOptions, like: Tensor) -> RowSides:
    """Labels, weights, alpha and cap of the rows. `like`: [..., any], of the positions, dtype and device of logits."""
    labels, weight, alpha, cap = request[:4]
    if options.ce_weight != 0 and labels is None:
        raise ValueError("ce_weight needs labels: pass labels of the positions or set ce_weight=0.")
    flat = SideRows(like, loss_dtype(like.dtype))
    flat_labels, flat_weight = flat(labels, "labels", integer=True), flat(weight, "weight")
    if request.rows is not None:
        flat_weight = _only(_checked_rows(request.rows, row_count(like.shape[:-1])), flat_weight, like)
    return RowSides(
        flat_labels,
        _weight_of_rows(flat_weight, flat_labels, like, request, options.ignore_index),
        flat(alpha if isinstance(alpha, Tensor) else None, "alpha"),
        flat(_cap_tensor(cap, like), "cap"),
    )


class SideRows:
    """Flattens a side input [...] to contiguous rows of the right dtype, with checks."""

    def __init__(self, logits: Tensor, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = logits.shape[:-1], logits.device, dtype

    def __call__(self, value: Tensor | None, name: str, integer: bool = False) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}; call to_dense().")
        if value.dim() == 0 and name in ("alpha", "cap"):  # a number that a compiler or a schedule keeps in a tensor
            value = value.expand(self.shape)
        if value.shape != self.shape:
            raise ValueError(f"{name} must have one entry per position, {list(self.shape)}, got {list(value.shape)}.")
        if value.device != self.device:
            raise ValueError(f"{name} must be on the device of student_logits, {self.device}, got {value.device}.")
        if integer and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
            raise TypeError(f"{name} must be an integer tensor, got {value.dtype}.")
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}.")
        return value.detach().reshape(-1).to(torch.int64 if integer else self.dtype)


def _cap_tensor(cap: float | Tensor | None, logits: Tensor) -> Tensor | None:
    if cap is None or isinstance(cap, Tensor):
        return cap
    cap = checked_number(cap, "cap")
    if not cap >= 0:
        raise ValueError(f"cap must not be negative, got {cap}.")
    return torch.full(logits.shape[:-1], cap, dtype=loss_dtype(logits.dtype), device=logits.device)


def _weight_of_rows(
    weight: Tensor | None, labels: Tensor | None, like: Tensor, request: LossRequest, ignore_index: int
) -> Tensor | None:
    """The factor of every row, the division of "mean" included: the kernel's gradient is then final."""
    reduction, num_items = request.reduction, request.num_items
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f"num_items is the divisor of reduction='mean', got reduction={reduction!r}.")
        return weight
    if weight is None:
        weight = torch.ones(row_count(like.shape[:-1]), dtype=loss_dtype(like.dtype), device=like.device)
    if num_items is not None:
        total = _checked_num_items(num_items, weight)
    else:
        # A weight that is no number spoils its own row only, so it stays out of the divisor.
        counted = weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        total = (counted if labels is None else counted * (labels != ignore_index)).sum()
    return weight * torch.where(total == 0, torch.zeros_like(total), 1 / total)


def _checked_rows(rows: Tensor, positions: int) -> Tensor:
    """The values are looked at where that does not wait for a device and no compiler traces."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be an int64 tensor of indices into the flattened positions, got {found}.")
    if rows.dim() != 1:
        raise ValueError(f"rows must have shape [n], got {list(rows.shape)}.")
    if type(rows) is not Tensor or rows.device.type != "cpu" or torch.compiler.is_compiling() or len(rows) == 0:
        return rows
    low, high = (int(x) for x in rows.aminmax())
    if low < 0 or high >= positions:
        raise ValueError(f"rows must lie in 0..{positions - 1}, the flattened positions, got {low}..{high}.")
    if len(rows.unique()) < len(rows):
        raise ValueError("rows must be distinct, got some of them more than once.")
    return rows


def _only(rows: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """Row weights that are 0 outside of `rows`: what is not looked at must not enter the mean's divisor."""
    listed = torch.zeros(row_count(like.shape[:-1]), dtype=loss_dtype(like.dtype), device=like.device)
    listed = listed.index_fill(0, rows, 1.0)
    return listed if weight is None else torch.where(listed > 0, weight, listed)


def deferred_weight(weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Row weights for the kernel and those to apply to its losses.

    A gradient in float16 has no digits left below 6e-8, where the division of "mean" easily takes it, and what a
    gradient scaler multiplies by later is lost by then. So its rows are weighted in the backward pass, in float32;
    the kernel only learns which of them count.
    """
    if weight is None or dtype != torch.float16:
        return weight, None
    return torch.where(weight.isnan(), weight, (weight != 0).to(weight.dtype)), weight


def _checked_num_items(num_items: int | Tensor, weight: Tensor) -> Tensor:
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {list(num_items.shape)}.")
        if num_items.is_complex() or num_items.dtype == torch.bool:
            raise TypeError(f"num_items must hold a number, got {num_items.dtype}.")
        items = num_items.detach().reshape(()).to(weight)
        return torch.where(items < 0, torch.full_like(items, math.nan), items)
    count = checked_number(num_items, "num_items")
    if not 0.0 <= count < math.inf:
        raise ValueError(f"num_items must be finite and not negative, got {num_items}.")
    return torch.full((), count, dtype=weight.dtype, device=weight.device)
