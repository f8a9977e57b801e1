"""Checks of the losses' arguments, and positions [...] flattened to rows: before any kernel runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.divergence import DivergenceOptions, loss_dtype, row_count
from ..ops.extension import require_backend
from .options import TAILS, checked_number

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student_logits", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise TypeError(f"{name} must be a tensor of logits, got {type(logits).__name__}.")
        if logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}.")
        if logits.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {logits.layout}; call to_dense().")
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"{name} must have shape [..., V] with V >= 1, got {list(logits.shape)}.")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher must have the positions of student_logits, {list(student.shape[:-1])}, got "
            f"{list(teacher.shape[:-1])}; select or pad the same tokens on both sides."
        )
    if student.device != teacher.device:
        raise ValueError(f"teacher must be on the device of student_logits, {student.device}, got {teacher.device}.")
    if (student.dtype == torch.float64) != (teacher.dtype == torch.float64):
        raise TypeError(f"float64 logits need float64 on both sides, got {student.dtype} and {teacher.dtype}.")
    if student.dtype == torch.float64 and student.device.type == "cuda":
        raise TypeError("student_logits must be float32, bfloat16 or float16 on CUDA; float64 is for the CPU.")
    require_backend(student.device)


def check_vocab_size(vocab_size: int, narrower: int) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}.")
    if not 1 <= vocab_size <= narrower:
        raise ValueError(f"vocab_size must lie in 1..{narrower}, the narrower vocabulary, got {vocab_size}.")


def check_tail(tail: str, compressed: bool) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}.")
    if tail != "bucket" and not compressed:
        raise ValueError(f"tail is an option of a CompressedLogits teacher, got tail={tail!r} with a tensor of logits.")


def check_inplace(student: Tensor, teacher: Any) -> None:
    """That `student` may be overwritten and somebody wants its gradient."""
    if torch.compiler.is_compiling():
        raise RuntimeError("inplace=True is for eager mode; under torch.compile leave it False.")
    if not student.requires_grad:
        raise ValueError("inplace=True writes the gradient over student_logits, but they do not require a gradient.")
    if student.is_leaf:
        raise ValueError(
            "inplace=True would destroy student_logits, which are a leaf of the graph; pass logits that were computed "
            "from something that requires a gradient, or inplace=False."
        )
    if student.shape[-1] > 1 and student.stride(-1) != 1:
        raise ValueError(
            f"inplace=True needs student_logits with stride 1 along the vocabulary, got stride {student.stride(-1)}."
        )
    if _overlaps_itself(student):
        raise ValueError(
            "inplace=True needs student_logits whose positions do not share memory; expanded and unfolded ones do."
        )
    if isinstance(teacher, Tensor) and _overlap(student, teacher):
        raise ValueError(
            "inplace=True would overwrite teacher, which shares memory with student_logits at other positions; pass a "
            "copy of one of them."
        )
    if student.dim() > 3 and student.detach().flatten(0, -3).data_ptr() != student.data_ptr():
        raise ValueError(
            f"inplace=True needs student_logits that flatten to equally spaced rows, got strides {student.stride()}."
        )


def _overlaps_itself(x: Tensor) -> bool:
    """Whether entries share memory, for all that slicing, transposing, expanding and unfolding make of a tensor."""
    last = 0  # how far the dimensions of smaller stride reach
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride <= last:
            return True
        last += stride * (size - 1)
    return False


def _overlap(student: Tensor, teacher: Tensor) -> bool:
    """Whether teacher entries lie in memory of other student entries than their own; side by side in one tensor is
    fine."""
    if student.untyped_storage().data_ptr() != teacher.untyped_storage().data_ptr() or student.numel() == 0:
        return False
    if (student.data_ptr(), student.shape, student.stride()) == (teacher.data_ptr(), teacher.shape, teacher.stride()):
        return False

    def end(x: Tensor) -> int:
        return x.data_ptr() + x.element_size() * (
            1 + sum(d * (n - 1) for n, d in zip(x.shape, x.stride(), strict=True))
        )

    if end(student) <= teacher.data_ptr() or end(teacher) <= student.data_ptr():
        return False
    strides = student.stride()[:-1]
    if student.dtype != teacher.dtype or strides != teacher.stride()[:-1] or teacher.stride(-1) != 1:
        return True
    pitch = min((d for n, d in zip(student.shape, strides, strict=False) if n > 1), default=0)
    apart = (teacher.data_ptr() - student.data_ptr()) // student.element_size() % max(pitch, 1)
    return any(d % max(pitch, 1) for d in strides) or apart < student.shape[-1] or pitch - apart < teacher.shape[-1]


def check_vocabularies(options: DivergenceOptions, student: int, teacher: int) -> None:
    """Refuses what would be infinite at every position."""
    zero_alpha = options.alpha == 0
    both = options.divergence in ("symmetric_kl", "token_adaptive", "adaptive_kl")
    forward = both or options.divergence == "forward_kl" or (options.divergence == "skew_kl" and zero_alpha)
    reverse = both or options.divergence == "reverse_kl" or (options.divergence == "skew_reverse_kl" and zero_alpha)
    if (forward and teacher > student) or (reverse and student > teacher):
        wider = "teacher" if teacher > student else "student_logits"
        raise ValueError(
            f"{options.divergence} is infinite when {wider} has entries that the other side lacks ({student} student, "
            f"{teacher} teacher entries); pass vocab_size={min(student, teacher)} to use the entries that both have."
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


def cap_tensor(cap: float | Tensor | None, logits: Tensor) -> Tensor | None:
    if cap is None or isinstance(cap, Tensor):
        return cap
    cap = checked_number(cap, "cap")
    if not cap >= 0:
        raise ValueError(f"cap must not be negative, got {cap}.")
    return torch.full(logits.shape[:-1], cap, dtype=loss_dtype(logits.dtype), device=logits.device)


def weight_of_rows(
    weight: Tensor | None,
    labels: Tensor | None,
    shape: torch.Size,
    logits: Tensor,
    reduction: str,
    num_items: int | Tensor | None,
    ignore_index: int,
) -> Tensor | None:
    """The factor of every row, the division of "mean" included: the kernel's gradient is then final."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if reduction != "mean":
        if num_items is not None:
            raise ValueError(f"num_items is the divisor of reduction='mean', got reduction={reduction!r}.")
        return weight
    if weight is None:
        weight = torch.ones(row_count(shape), dtype=loss_dtype(logits.dtype), device=logits.device)
    if num_items is not None:
        total = _checked_num_items(num_items, weight)
    else:
        # A weight that is no number spoils its own row only, so it stays out of the divisor.
        counted = weight.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        total = (counted if labels is None else counted * (labels != ignore_index)).sum()
    return weight * torch.where(total == 0, torch.zeros_like(total), 1 / total)


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
