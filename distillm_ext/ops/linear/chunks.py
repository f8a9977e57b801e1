"""The computation of `linear_divergence`: heads, divergence and their gradients, a chunk of rows at a time.

What is never materialised: the [R, V] logits of either side and their gradient. A chunk of rows goes through both
heads, the operator `divergence` and the products of its gradient before the next one starts, so the gradients of hidden
states, weight and bias are complete when the forward pass ends (as in Liger Kernel, Hsu et al., 2024, for hard labels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergence import CROSS_ENTROPY, loss_dtype
from ..row_losses import row_losses, row_losses_
from ..sparse_divergence import CompressedRows
from .call import HeadRows, LinearDivergenceCall, over_tensors
from .gradients import Accumulate, Gradients, accumulate_cpu, accumulate_cuda, spread

# What automatic chunks may take: logits of both sides. The gradient takes the place of the student's.
MEMORY_BUDGET = 256 * 2**20
# Fewer rows would leave the products bound by reading the weights.
MIN_CHUNK_ROWS = 16
# A soft-cap's own gradient needs the logits that the gradient overwrites: so many parts of a chunk keep theirs in turn.
_SOFTCAP_PARTS = 8


def project(head: HeadRows, out: Tensor) -> Tensor:
    """Logits of the rows, into `out`: softcap tanh(scale (h Wᵀ + b) / softcap), without a softcap scale (h Wᵀ + b).

    The factor rides on the product, so that only a softcap passes over the logits again. Autocast leaves products alone
    that are written in place or to `out`: the dtypes are the caller's.
    """
    factor = head.scale / head.softcap if head.softcap else head.scale
    if head.bias is None:
        out.addmm_(head.hidden, head.weight.t(), beta=0, alpha=factor)
    else:
        torch.addmm(head.bias, head.hidden, head.weight.t(), beta=factor, alpha=factor, out=out)
    return out.tanh_().mul_(head.softcap) if head.softcap else out


@dataclass
class _Chunks:
    """One call in progress. `call` holds the rows that count, in the dtypes of the products, cut to the vocabulary."""

    call: LinearDivergenceCall
    cross_entropy: LinearDivergenceCall | None  # of the same rows, where it is asked for beside a divergence
    teacher_rows: Tensor | None  # where teacher logits, which are not compacted, have their rows
    size: int
    student_buffer: Tensor
    teacher_buffer: Tensor
    kept_logits: Tensor  # [size / _SOFTCAP_PARTS, V], [0] where not needed

    def run(self, begin: int, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """Rows from `begin`: losses [n], cross-entropies [n] (or [0]), metrics [n, 3] (or [0]); adds to the gradients.

        The student's logits become their gradient.
        """
        call = self.call
        part = slice(begin, min(begin + self.size, call.student.hidden.shape[0]))
        head = call.student._replace(hidden=call.student.hidden[part])
        student = project(head, self.student_buffer[: part.stop - part.start])
        ce = student.new_empty(0)
        if self.cross_entropy is not None:
            ce, _ = _losses(row_losses, self.cross_entropy, student, _no_teacher(student), part)
        teacher = _no_teacher(student) if call.teacher is None else self._teacher(call.teacher, part)
        loss, metrics = self._overwrite(student, teacher, part, gradients)
        if gradients.needed:
            gradients.add(part, student)
        return loss, loss if call.teacher is None else ce, metrics

    def _overwrite(
        self, student: Tensor, teacher: Tensor | CompressedRows, part: slice, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """Losses and metrics; where gradients are needed, that of the head's output takes the place of `student`."""
        call, softcap = self.call, self.call.student.softcap
        if not gradients.needed:
            return _losses(row_losses, call, student, teacher, part)
        if not softcap:
            return _losses(row_losses_, call, student, teacher, part)
        found = []
        for begin in range(0, student.shape[0], len(self.kept_logits)):
            piece = slice(begin, min(begin + len(self.kept_logits), student.shape[0]))
            gradient, kept = student[piece], self.kept_logits[: piece.stop - begin].copy_(student[piece])
            rows = slice(part.start + begin, part.start + piece.stop)
            found.append(_losses(row_losses_, call, gradient, _rows_of(teacher, piece), rows))
            # d softcap tanh(x / softcap) / dx = 1 - (logit / softcap)^2
            gradient.addcmul_(gradient, kept.square_(), value=-1 / softcap**2)
        losses, metrics = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(metrics)

    def _teacher(self, teacher: HeadRows | CompressedRows | Tensor, part: slice) -> Tensor | CompressedRows:
        """What the operators compare the rows of `part` with: logits, or kept ones."""
        if isinstance(teacher, HeadRows):
            head = teacher._replace(hidden=teacher.hidden[part])
            return project(head, self.teacher_buffer[: part.stop - part.start])
        if isinstance(teacher, Tensor) and self.teacher_rows is not None:
            return teacher.index_select(0, self.teacher_rows[part])
        return _rows_of(teacher, part)


def _losses(
    operator: Callable[..., tuple[Tensor, Tensor]],
    call: LinearDivergenceCall,
    student: Tensor,
    teacher: Tensor | CompressedRows,
    part: slice,
) -> tuple[Tensor, Tensor]:
    """Losses and metrics of the rows of `part`, of which `student` and `teacher` are."""
    sides = over_tensors(call.sides, lambda x: x[part])
    return operator(student, teacher, sides, call.options, need_metrics=call.need_metrics)


def _no_teacher(student: Tensor) -> Tensor:
    """Teacher logits for cross-entropy alone."""
    return student.new_zeros(student.shape[0], 1)


def _rows_of(teacher: Tensor | CompressedRows, part: slice) -> Tensor | CompressedRows:
    return teacher[part] if isinstance(teacher, Tensor) else over_tensors(teacher, lambda x: x[part])


def _cross_entropy(call: LinearDivergenceCall) -> LinearDivergenceCall:
    """The call for cross-entropy alone."""
    cap = call.student.hidden.new_zeros(call.student.hidden.shape[0], dtype=loss_dtype(call.dtype))
    return call._replace(
        sides=call.sides._replace(alpha_rows=None, cap=cap),
        options=CROSS_ENTROPY._replace(ignore_index=call.options.ignore_index),
        need_metrics=False,
    )


def _counted(call: LinearDivergenceCall) -> Tensor | None:
    """[R] bool: rows whose label and weight let them count; None where all do."""
    labels, weight, *_ = call.sides
    counted = None if labels is None else labels != call.options.ignore_index
    if weight is not None:
        weighted = weight != 0
        counted = weighted if counted is None else counted & weighted
    return counted


def _prepared(call: LinearDivergenceCall, rows: Tensor | None) -> LinearDivergenceCall:
    """The call with the given rows alone (not of teacher logits), products' dtypes, and the vocabulary cut."""

    def take(x: Tensor) -> Tensor:
        return x if rows is None else x.index_select(0, rows)

    vocab, teacher = call.vocab_size or None, call.teacher
    if isinstance(teacher, HeadRows):
        teacher = _cut(teacher, take(teacher.hidden), vocab, teacher.weight.dtype)
    elif isinstance(teacher, CompressedRows):
        teacher = over_tensors(teacher, take)
    elif teacher is not None:
        teacher = teacher[:, :vocab]
    student = _cut(call.student, take(call.student.hidden), vocab, call.dtype)
    return call._replace(student=student, teacher=teacher, sides=over_tensors(call.sides, take))


def _cut(head: HeadRows, hidden: Tensor, vocab: int | None, dtype: torch.dtype) -> HeadRows:
    """The head with other hidden states, its first `vocab` entries alone, in the dtype of its products."""
    bias = None if head.bias is None else head.bias[:vocab].to(dtype)
    return head._replace(hidden=hidden.to(dtype), weight=head.weight[:vocab].to(dtype), bias=bias)


def _chunk_size(call: LinearDivergenceCall, gradient: bool) -> int:
    """Rows per chunk, all chunks alike."""
    rows, teacher = call.student.hidden.shape[0], call.teacher
    row_bytes = call.student.weight.shape[0] * call.dtype.itemsize
    if gradient and call.student.softcap:
        row_bytes += row_bytes // _SOFTCAP_PARTS
    if isinstance(teacher, HeadRows):
        row_bytes += teacher.weight.shape[0] * teacher.weight.dtype.itemsize
    elif isinstance(teacher, Tensor):
        row_bytes += teacher.shape[1] * teacher.dtype.itemsize
    automatic = max(MIN_CHUNK_ROWS, MEMORY_BUDGET // row_bytes)
    chunks = -(-rows // (call.chunk_rows or automatic))
    return -(-rows // max(chunks, 1))


def _begun(call: LinearDivergenceCall, rows: Tensor | None, gradient: bool) -> _Chunks:
    """A prepared call with the buffers that its chunks share."""
    size, weight = _chunk_size(call, gradient), call.student.weight
    teacher = call.teacher.weight if isinstance(call.teacher, HeadRows) else weight.new_empty(0)
    kept = -(-size // _SOFTCAP_PARTS) if gradient and call.student.softcap else 0
    alone = call.teacher is None
    beside = _cross_entropy(call) if call.need_ce and not alone else None
    return _Chunks(
        _cross_entropy(call) if alone else call, beside, rows, size,
        student_buffer=weight.new_empty(size, weight.shape[0]),
        teacher_buffer=teacher.new_empty(size, teacher.shape[0]), kept_logits=weight.new_empty(kept, weight.shape[0]),
    )  # fmt: skip


def _run(original: LinearDivergenceCall, rows: Tensor | None, accumulate: Accumulate) -> tuple[Tensor, ...]:
    call = _prepared(original, rows)
    gradients = Gradients(call, original, accumulate)
    chunks, counted = _begun(call, rows, gradients.needed), call.student.hidden.shape[0]
    parts = [chunks.run(begin, gradients) for begin in range(0, counted, max(chunks.size, 1))]
    empty = call.student.weight.new_empty(0, dtype=loss_dtype(call.dtype))
    loss = torch.cat([empty, *(part[0] for part in parts)])
    ce = torch.cat([empty, *(part[1] for part in parts)]) if call.need_ce else torch.zeros_like(loss)
    metrics = torch.cat([empty.view(0, 3), *(part[2] for part in parts)]) if call.need_metrics else empty
    total = original.student.hidden.shape[0]
    if call.need_metrics:
        metrics = spread(metrics, rows, total)
    if call.per_row:
        loss, ce = (spread(x, rows, total) for x in (loss, ce))
    else:
        loss, ce = loss.sum(), ce.sum()
    return loss, ce, metrics, *gradients.result(rows)


def compute_cpu(call: LinearDivergenceCall) -> tuple[Tensor, ...]:
    """Loss, cross-entropy, metrics and the gradients of hidden, weight and bias, as the operator returns them."""
    rows, counted = call.rows, _counted(call)
    if counted is not None:
        # Rows that do not count never meet a head. On the host this costs a look at R flags.
        rows = counted.nonzero().squeeze(1) if rows is None else rows[counted[rows]]
        rows = None if len(rows) == len(counted) and call.rows is None else rows
    return _run(call, rows, accumulate_cpu)


def compute_cuda(call: LinearDivergenceCall) -> tuple[Tensor, ...]:
    """As `compute_cpu`, without a look at the device's values."""
    counted = _counted(call)
    if counted is not None:
        # Their number is not known on the host, so they stay; a NaN in one must not meet its zero gradient.
        hidden = call.student.hidden.masked_fill(~counted.unsqueeze(-1), 0)
        call = call._replace(student=call.student._replace(hidden=hidden))
    return _run(call, call.rows, accumulate_cuda)
