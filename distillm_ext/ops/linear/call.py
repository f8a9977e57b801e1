"""The arguments of `linear_divergence`: one object, and the same as the flat list that an operator takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..divergence import DivergenceOptions, RowSides
from ..sparse_divergence import CompressedRows

Group = TypeVar("Group", bound="tuple[Any, ...]")  # a NamedTuple


class HeadRows(NamedTuple):
    """R rows of hidden states and the head that makes logits of them, softcap tanh(scale (h Wᵀ + b) / softcap)."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float = 0.0  # 0: none


class LinearDivergenceCall(NamedTuple):
    """What one call of the operator is about; `distillm_ext.linear` documents and checks it."""

    student: HeadRows
    teacher: HeadRows | CompressedRows | Tensor | None  # a tensor: logits [R, Vt]; None: cross-entropy alone
    sides: RowSides
    options: DivergenceOptions
    rows: Tensor | None  # int64, distinct: the only rows to look at
    dtype: torch.dtype  # of the student's products
    chunk_rows: int  # 0: from the memory budget
    vocab_size: int  # entries of both sides to use; 0: all
    per_row: bool  # loss [R]; its gradients are formed in the backward pass
    need_ce: bool
    need_metrics: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool


_OTHERS = LinearDivergenceCall._fields.index("options") + 1  # where the fields after the groups begin
_NO_HEAD = (None,) * len(HeadRows._fields)
_NOT_COMPRESSED = (None,) * len(CompressedRows._fields)
_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", torch.dtype: "ScalarType", str: "str", float: "float", int: "SymInt",
    bool: "bool",
}  # fmt: skip


def schema_arguments() -> str:
    """The arguments of the operator: the fields of each group in turn. Of the kinds of teacher all but one are None."""
    kinds = (_arguments(get_type_hints(group), "teacher_", optional=True) for group in (HeadRows, CompressedRows))
    groups = (_arguments(get_type_hints(group)) for group in (RowSides, DivergenceOptions))
    others = dict(islice(get_type_hints(LinearDivergenceCall).items(), _OTHERS, None))
    student = _arguments(get_type_hints(HeadRows), "student_")
    return ", ".join((student, "Tensor? teacher_logits", *kinds, *groups, _arguments(others)))


def _arguments(types: dict[str, Any], prefix: str = "", *, optional: bool = False) -> str:
    mark = "?" if optional else ""
    return ", ".join(f"{_TYPES[kind]}{mark} {prefix}{name}" for name, kind in types.items()).replace("??", "?")


def flatten(call: LinearDivergenceCall) -> tuple[Any, ...]:
    """The operator's arguments, in the order of its schema."""
    teacher = call.teacher
    return (
        *call.student,
        teacher if isinstance(teacher, Tensor) else None,
        *(teacher if isinstance(teacher, HeadRows) else _NO_HEAD),
        *(teacher if isinstance(teacher, CompressedRows) else _NOT_COMPRESSED),
        *call.sides,
        *call.options,
        *call[_OTHERS:],
    )


def unflatten(arguments: Sequence[Any]) -> LinearDivergenceCall:
    """The call of which `flatten` made these arguments."""
    values = iter(arguments)

    def take(group: Any) -> Any:
        return group._make(islice(values, len(group._fields)))

    student, logits, head, compressed = take(HeadRows), next(values), take(HeadRows), take(CompressedRows)
    teacher = head if head.hidden is not None else compressed if compressed.ids is not None else logits
    return LinearDivergenceCall(student, teacher, take(RowSides), take(DivergenceOptions), *values)


def over_tensors(group: Group, function: Callable[[Tensor], Tensor]) -> Group:
    """The group with `function` applied to each of its tensors."""
    return type(group)(*(function(x) if isinstance(x, Tensor) else x for x in group))
