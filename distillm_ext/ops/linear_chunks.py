"""The computation of `linear_divergence`: heads, divergence and their gradients, a chunk of rows at a time.

What is never materialised: the [R, V] logits of either side and their gradient. A chunk of rows goes through both
heads, the operator `divergence` and the products of its gradient before the next one starts, so the gradients of hidden
states, weight and bias are complete when the forward pass ends (as in Liger Kernel, Hsu et al., 2024, for hard labels).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from .divergence import DivergenceOptions, RowSides, loss_dtype
from .linear_call import LinearDivergenceCall
from .linear_gradients import Accumulate, Gradients, accumulate_cpu, accumulate_cuda, spread
from .sparse_divergence import CompressedRows, sparse_divergence, sparse_divergence_over

# What automatic chunks may take: logits of both sides. The gradient takes the place of the student's.
MEMORY_BUDGET = 256 * 2**20
# Fewer rows would leave the products bound by reading the weights.
MIN_CHUNK_ROWS = 16
# A soft-cap's own gradient needs the logits that the gradient overwrites: so many parts of a chunk keep theirs in turn.
_SOFTCAP_PARTS = 8


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float, out: Tensor) -> Tensor:
    """Logits of one chunk, into `out`: softcap tanh(scale (h W^T + b) / softcap), without a softcap scale (h W^T + b).

    The factor rides on the product, so that only a softcap passes over the logits again. Autocast leaves products alone
    that are written in place or to `out`: the dtypes are the caller's.
    """
    factor = scale / softcap if softcap else scale
    if bias is None:
        out.addmm_(hidden, weight.t(), beta=0, alpha=factor)
    else:
        torch.addmm(bias, hidden, weight.t(), beta=factor, alpha=factor, out=out)
    return out.tanh_().mul_(softcap) if softcap else out


@dataclass
class _Chunks:
    """One call in progress. `call` holds the rows that count, in the dtypes of the products, cut to the vocabulary."""

    call: LinearDivergenceCall
    teacher_rows: Tensor | None  # where teacher logits, which are not compacted, have their rows
    size: int
    student_buffer: Tensor
    teacher_buffer: Tensor | None
    kept_logits: Tensor  # [size / _SOFTCAP_PARTS, V], [0] where not needed

    def run(self, begin: int, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor]:
        """Rows from `begin`: losses [n], cross-entropies [n] (or [0]), metrics [n, 3] (or [0]); adds to the gradients.

        The student's logits become their gradient.
        """
        call = self.call
        part = slice(begin, min(begin + self.size, call.hidden.shape[0]))
        student = self.student_buffer[: part.stop - part.start]
        project(call.hidden[part], call.weight, call.bias, call.scale, call.softcap, student)
        ce = student.new_empty(0)
        if call.teacher is None and call.ids is None:
            loss, metrics = self._overwrite(
                _alone(call), student, student.new_zeros(student.shape[0], 1), part, gradients
            )
            ce = loss
        else:
            if call.need_ce:
                ce, _ = _divergence(_alone(call), student, student.new_zeros(student.shape[0], 1), part)
            loss, metrics = self._overwrite(call, student, self._teacher_logits(part), part, gradients)
        if gradients.needed:
            gradients.add(part, student)
        return loss, ce, metrics

    def _overwrite(
        self, call: LinearDivergenceCall, student: Tensor, teacher: Tensor | None, part: slice, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """Losses and metrics; where gradients are needed, that of the head's output takes the place of `student`."""
        if not gradients.needed:
            return _divergence(call, student, teacher, part)
        if not call.softcap:
            return _divergence_(call, student, teacher, part)
        found = []
        for begin in range(0, student.shape[0], len(self.kept_logits)):
            piece = slice(begin, min(begin + len(self.kept_logits), student.shape[0]))
            gradient, kept = student[piece], self.kept_logits[: piece.stop - begin].copy_(student[piece])
            rows = slice(part.start + begin, part.start + piece.stop)
            found.append(_divergence_(call, gradient, None if teacher is None else teacher[piece], rows))
            # d softcap tanh(x / softcap) / dx = 1 - (logit / softcap)^2
            gradient.addcmul_(gradient, kept.square_(), value=-1 / call.softcap**2)
        losses, metrics = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(metrics)

    def _teacher_logits(self, part: slice) -> Tensor | None:
        """None of a compressed teacher, which has rows of its own in the call."""
        call = self.call
        if call.teacher is None:
            return None
        if call.teacher_weight is None:
            if self.teacher_rows is None:
                return call.teacher[part]
            return call.teacher.index_select(0, self.teacher_rows[part])
        assert self.teacher_buffer is not None  # made for a teacher's head
        out = self.teacher_buffer[: part.stop - part.start]
        return project(
            call.teacher[part], call.teacher_weight, call.teacher_bias, call.teacher_scale, call.teacher_softcap, out
        )


def _alone(call: LinearDivergenceCall) -> LinearDivergenceCall:
    """Cross-entropy alone, by the same kernel: a divergence capped at 0 adds nothing, to the gradient neither."""
    return call._replace(
        divergence="total_variation", temperature=1.0, ce_weight=1.0, detach_mixture=False, alpha_rows=None, ids=None,
        cap=call.hidden.new_zeros(call.hidden.shape[0], dtype=loss_dtype(call.dtype)), need_metrics=False,
    )  # fmt: skip


def _sides(call: LinearDivergenceCall, part: slice) -> RowSides:
    """The side inputs of the rows of `part`."""
    sides = (call.labels, call.row_weight, call.alpha_rows, call.cap)
    return RowSides(*(None if x is None else x[part] for x in sides))


def _options(call: LinearDivergenceCall) -> DivergenceOptions:
    return DivergenceOptions(
        call.divergence, call.alpha, call.beta, call.temperature, call.ce_weight, call.ignore_index,
        call.detach_mixture,
    )  # fmt: skip


def _arguments(call: LinearDivergenceCall, part: slice) -> tuple[Any, ...]:
    """What the operators of teacher logits take behind student and teacher, for the rows of `part`."""
    return (*_sides(call, part), *astuple(_options(call)), 0)


def _compressed(call: LinearDivergenceCall, part: slice) -> CompressedRows:
    """The compressed teacher of the rows of `part`."""
    ids, logprobs, log_norm, tail_logprob = call.ids, call.logprobs, call.log_norm, call.tail_logprob
    assert ids is not None and logprobs is not None and log_norm is not None and tail_logprob is not None
    counts = None if call.counts is None else call.counts[part]
    return CompressedRows(
        ids[part], logprobs[part], log_norm[part], tail_logprob[part], counts, call.teacher_vocab, call.tail
    )


def _divergence(
    call: LinearDivergenceCall, student: Tensor, teacher: Tensor | None, part: slice
) -> tuple[Tensor, Tensor]:
    if call.ids is not None:
        loss = sparse_divergence(student, _compressed(call, part), _sides(call, part), _options(call))
        return loss, loss.new_empty(0)
    loss, _, metrics = torch.ops.distillm_ext.divergence(
        student, teacher, *_arguments(call, part), False, call.need_metrics
    )
    return loss, metrics


def _divergence_(
    call: LinearDivergenceCall, student: Tensor, teacher: Tensor | None, part: slice
) -> tuple[Tensor, Tensor]:
    if call.ids is not None:
        loss = sparse_divergence_over(student, _compressed(call, part), _sides(call, part), _options(call))
        return loss, loss.new_empty(0)
    return torch.ops.distillm_ext.divergence_(student, teacher, *_arguments(call, part), call.need_metrics)


def _counted(call: LinearDivergenceCall) -> Tensor | None:
    """[R] bool: rows whose label and weight let them count; None where all do."""
    counted = None if call.labels is None else call.labels != call.ignore_index
    if call.row_weight is not None:
        weighted = call.row_weight != 0
        counted = weighted if counted is None else counted & weighted
    return counted


def _prepared(call: LinearDivergenceCall, rows: Tensor | None) -> LinearDivergenceCall:
    """The call with the given rows alone (not of teacher logits), products' dtypes, and the vocabulary cut."""

    def take(x: Tensor | None) -> Tensor | None:
        return x if x is None or rows is None else x.index_select(0, rows)

    vocab = call.vocab_size or call.weight.shape[0]
    teacher, teacher_weight, teacher_bias = call.teacher, call.teacher_weight, call.teacher_bias
    if teacher_weight is not None:
        teacher_weight = teacher_weight[: call.vocab_size or None]
        teacher = None if teacher is None else take(teacher.to(teacher_weight.dtype))
        teacher_bias = None if teacher_bias is None else teacher_bias[: call.vocab_size or None].to(teacher_weight)
    elif teacher is not None and call.vocab_size:
        teacher = teacher[:, : call.vocab_size]
    hidden = call.hidden if rows is None else call.hidden.index_select(0, rows)
    return call._replace(
        hidden=hidden.to(call.dtype), weight=call.weight[:vocab].to(call.dtype),
        bias=None if call.bias is None else call.bias[:vocab].to(call.dtype),
        teacher=teacher, teacher_weight=teacher_weight, teacher_bias=teacher_bias,
        ids=take(call.ids), logprobs=take(call.logprobs), log_norm=take(call.log_norm),
        tail_logprob=take(call.tail_logprob), counts=take(call.counts), labels=take(call.labels),
        row_weight=take(call.row_weight), alpha_rows=take(call.alpha_rows), cap=take(call.cap),
    )  # fmt: skip


def _chunk_size(call: LinearDivergenceCall, gradient: bool) -> int:
    """Rows per chunk, all chunks alike."""
    rows = call.hidden.shape[0]
    row_bytes = call.weight.shape[0] * call.dtype.itemsize
    if gradient and call.softcap:
        row_bytes += row_bytes // _SOFTCAP_PARTS
    if call.teacher is not None:
        width = call.teacher.shape[1] if call.teacher_weight is None else call.teacher_weight.shape[0]
        row_bytes += width * call.teacher.dtype.itemsize
    automatic = max(MIN_CHUNK_ROWS, MEMORY_BUDGET // row_bytes)
    chunks = -(-rows // (call.chunk_rows or automatic))
    return -(-rows // max(chunks, 1))


def _run(original: LinearDivergenceCall, rows: Tensor | None, accumulate: Accumulate) -> tuple[Tensor, ...]:
    call = _prepared(original, rows)
    gradients = Gradients(call, original, accumulate)
    size = _chunk_size(call, gradients.needed)
    vocab = call.weight.shape[0]
    student_buffer, teacher_buffer = call.weight.new_empty(size, vocab), None
    if call.teacher_weight is not None:
        teacher_buffer = call.teacher_weight.new_empty(size, call.teacher_weight.shape[0])
    kept_rows = -(-size // _SOFTCAP_PARTS) if gradients.needed and call.softcap else 0
    kept = call.weight.new_empty(kept_rows, vocab)
    chunks = _Chunks(call, rows, size, student_buffer, teacher_buffer, kept)
    parts = [chunks.run(begin, gradients) for begin in range(0, call.hidden.shape[0], max(size, 1))]
    empty = call.weight.new_empty(0, dtype=loss_dtype(call.dtype))
    loss = torch.cat([empty, *(part[0] for part in parts)])
    ce = torch.cat([empty, *(part[1] for part in parts)]) if call.need_ce else torch.zeros_like(loss)
    metrics = torch.cat([empty.view(0, 3), *(part[2] for part in parts)]) if call.need_metrics else empty
    total = original.hidden.shape[0]
    if call.need_metrics:
        metrics = spread(metrics, rows, total)
    if call.per_row:
        loss, ce = (spread(x, rows, total) for x in (loss, ce))
    else:
        loss, ce = loss.sum(), ce.sum()
    return loss, ce, metrics, *gradients.result(rows)


def linear_divergence_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    call = LinearDivergenceCall(*arguments)
    rows, counted = call.rows, _counted(call)
    if counted is not None:
        # Rows that do not count never meet a head. On the host this costs a look at R flags.
        rows = counted.nonzero().squeeze(1) if rows is None else rows[counted[rows]]
        rows = None if len(rows) == len(counted) and call.rows is None else rows
    return _run(call, rows, accumulate_cpu)


def linear_divergence_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    call = LinearDivergenceCall(*arguments)
    counted = _counted(call)
    if counted is not None:
        # Their number is not known on the host, so they stay; a NaN in one must not meet its zero gradient.
        call = call._replace(hidden=call.hidden.masked_fill(~counted.unsqueeze(-1), 0))
    return _run(call, call.rows, accumulate_cuda)
