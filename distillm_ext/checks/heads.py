"""Argument checks of `linear`: heads, teachers and how they fit, before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..containers import LinearHead
from ..ops.divergence import DivergenceOptions
from ..ops.extension import require_backend
from .logits import LOGIT_DTYPES, check_vocab_size, check_vocabularies

# What the fields of a head are called in the public functions.
_STUDENT_NAMES = ("student_hidden", "student_weight", "student_bias", "logit_softcap", "logit_scale")
_TEACHER_NAMES = ("teacher.hidden", "teacher.weight", "teacher.bias", "teacher.softcap", "teacher.scale")


def checked_sides(
    student: LinearHead, teacher: LinearHead | Tensor | None, options: DivergenceOptions, vocab_size: int | None
) -> torch.dtype:
    """Checks both sides and their fit; returns the dtype of the student's product."""
    check_head(student, _STUDENT_NAMES)
    vocabularies = [student.weight.shape[0]]
    dtype = _product_dtype(student)
    if isinstance(teacher, Tensor):
        _check_floating(teacher, "teacher")
        if teacher.dim() < 1 or teacher.shape[-1] == 0:
            raise ValueError(f"teacher must have shape [..., Vt] with Vt >= 1, got {list(teacher.shape)}.")
        _check_fit(teacher, "teacher", student.hidden, dtype)
        vocabularies.append(teacher.shape[-1])
    elif isinstance(teacher, LinearHead):
        check_head(teacher, _TEACHER_NAMES)
        _check_fit(teacher.hidden, "teacher.hidden", student.hidden, dtype)
        _check_fit(teacher.weight, "teacher.weight", None, dtype)
        if teacher.bias is not None:
            _check_fit(teacher.bias, "teacher.bias", None, dtype)
        vocabularies.append(teacher.weight.shape[0])
    elif teacher is not None:
        raise TypeError(
            f"teacher must be a TeacherHead, CompressedLogits or a tensor of logits, got {type(teacher).__name__}."
        )
    if vocab_size is not None:
        check_vocab_size(vocab_size, min(vocabularies))
    elif teacher is not None:
        check_vocabularies(options, *vocabularies)
    return dtype


def check_head(head: LinearHead, names: Sequence[str]) -> None:
    hidden_name, weight_name, bias_name, softcap_name, scale_name = names
    hidden, weight, bias = head.hidden, head.weight, head.bias
    _check_floating(hidden, hidden_name)
    _check_floating(weight, weight_name)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name} must have shape [..., H] with H >= 1, got {list(hidden.shape)}.")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} must have shape [V, {hidden.shape[-1]}], the last size of {hidden_name}, got "
            f"{list(weight.shape)}; a head's weight is [vocabulary, hidden size], as in torch.nn.Linear."
        )
    tensors = [(weight, weight_name)]
    if bias is not None:
        _check_floating(bias, bias_name)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name} must have shape [{weight.shape[0]}], got {list(bias.shape)}.")
        tensors.append((bias, bias_name))
    for tensor, name in tensors:
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of {hidden_name}, {hidden.device}, got {tensor.device}.")
    if head.softcap is not None:
        _check_positive(head.softcap, softcap_name)
    _check_positive(head.scale, scale_name)


def _check_positive(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def _check_floating(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}.")
    if hasattr(value, "full_tensor") and hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor; under FSDP call the loss inside the forward of the module "
            "that owns the weight, elsewhere pass its full_tensor()."
        )


def _product_dtype(student: LinearHead) -> torch.dtype:
    hidden, weight, device = student.hidden, student.weight, student.hidden.device
    require_backend(device)
    sides = ((weight, "student_weight"), (student.bias, "student_bias"))
    if weight.dtype != torch.float64 and device.type != "meta" and torch.is_autocast_enabled(device.type):
        for tensor, name in ((hidden, "student_hidden"), *sides):
            if tensor is not None and tensor.dtype == torch.float64:
                raise TypeError(f"{name} is float64, which autocast would narrow, but student_weight {weight.dtype}.")
        return torch.get_autocast_dtype(device.type)
    for tensor, name in sides:
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of student_hidden, {hidden.dtype}, outside of autocast, got "
                f"{tensor.dtype}; convert one of them."
            )
    if hidden.dtype == torch.float64 and device.type == "cuda":
        raise TypeError("student_hidden must be float32, bfloat16 or float16 on CUDA; float64 is for the CPU.")
    return hidden.dtype


def _check_fit(value: Tensor, name: str, hidden: Tensor | None, dtype: torch.dtype) -> None:
    if (value.dtype == torch.float64) != (dtype == torch.float64):
        raise TypeError(f"float64 needs float64 on both sides, got {dtype} student products and {value.dtype} {name}.")
    if hidden is None:
        return
    if value.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have the positions of student_hidden, {list(hidden.shape[:-1])}, got "
            f"{list(value.shape[:-1])}; select or pad the same tokens on both sides."
        )
    if value.device != hidden.device:
        raise ValueError(f"{name} must be on the device of student_hidden, {hidden.device}, got {value.device}.")


def check_devices(device: torch.device, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} must be on the device of student_hidden, {device}, got {value.device}.")


def checked_rows(rows: Tensor, positions: int) -> Tensor:
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


def checked_chunk(chunk_rows: int | None) -> int:
    if chunk_rows is None:
        return 0
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows must be an int or None, got {type(chunk_rows).__name__}.")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}.")
    return chunk_rows
