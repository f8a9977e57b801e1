"""The computation of `linear_divergence`: heads, divergence and their gradients, a chunk of rows at a time.

What is never materialised: the [R, V] logits of either side and their gradient. A chunk of rows goes through both
heads, the operator `divergence` and the products of its gradient before the next one starts, so the gradients of hidden
states, weight and bias are complete when the forward pass ends (as in Liger Kernel, Hsu et al., 2024, for hard labels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergence import loss_dtype

# What automatic chunks may take: logits of both sides and the gradient of the student's.
MEMORY_BUDGET = 256 * 2**20
# Fewer rows would leave the products bound by reading the weights.
MIN_CHUNK_ROWS = 16
# Vocabulary entries whose part of a weight gradient is formed at once where it has to be converted.
_TILE = 4096


class LinearDivergenceCall(NamedTuple):
    """The operator's arguments in the order of its schema; `linear` documents and checks them.

    R rows, student hidden size H and vocabulary V, teacher Ht and Vt.
    """

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    teacher: Tensor | None  # [R, Ht] with a teacher_weight, else logits [R, Vt]; None: cross-entropy alone
    teacher_weight: Tensor | None  # [Vt, Ht]
    teacher_bias: Tensor | None  # [Vt]
    labels: Tensor | None  # [R] int64
    row_weight: Tensor | None  # [R], the loss dtype, as alpha_rows and cap
    alpha_rows: Tensor | None
    cap: Tensor | None
    rows: Tensor | None  # int64, distinct: the only rows to look at
    scale: float
    softcap: float  # 0: none
    teacher_scale: float
    teacher_softcap: float
    divergence: str
    alpha: float
    beta: float
    temperature: float
    ce_weight: float
    ignore_index: int
    detach_mixture: bool
    dtype: torch.dtype  # of the student's products
    chunk_rows: int  # 0: from the memory budget
    vocab_size: int  # entries of both sides to use; 0: all
    per_row: bool  # loss [R]; its gradients are formed in the backward pass
    need_ce: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool


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

    def run(self, begin: int, gradients: _Gradients) -> tuple[Tensor, Tensor]:
        """Rows from `begin`: their losses [n] and cross-entropies [n] (or [0]); adds to the gradients."""
        call = self.call
        part = slice(begin, min(begin + self.size, call.hidden.shape[0]))
        student = self.student_buffer[: part.stop - part.start]
        project(call.hidden[part], call.weight, call.bias, call.scale, call.softcap, student)
        need = gradients.needed
        loss, ce = student.new_empty(0), student.new_empty(0)
        if call.need_ce or call.teacher is None:
            ce, gradient = self._cross_entropy(student, part, need and call.teacher is None)
            loss = ce
        if call.teacher is not None:
            loss, gradient = _divergence(call, student, self._teacher_logits(part), part, need)
        if need:
            if call.softcap:
                # d softcap tanh(x / softcap) / dx = 1 - (logit / softcap)^2; nobody reads the logits after this.
                gradient.addcmul_(gradient, student.square_(), value=-1 / call.softcap**2)
            gradients.add(part, gradient)
        return loss, ce

    def _teacher_logits(self, part: slice) -> Tensor:
        call = self.call
        assert call.teacher is not None  # the caller asked
        if call.teacher_weight is None:
            if self.teacher_rows is None:
                return call.teacher[part]
            return call.teacher.index_select(0, self.teacher_rows[part])
        assert self.teacher_buffer is not None  # made for a teacher's head
        out = self.teacher_buffer[: part.stop - part.start]
        return project(
            call.teacher[part], call.teacher_weight, call.teacher_bias, call.teacher_scale, call.teacher_softcap, out
        )

    def _cross_entropy(self, student: Tensor, part: slice, need_gradient: bool) -> tuple[Tensor, Tensor]:
        """Cross-entropy alone, by the same kernel: a divergence capped at 0 adds nothing, to the gradient neither."""
        rows = student.shape[0]
        alone = self.call._replace(
            divergence="total_variation", temperature=1.0, ce_weight=1.0, detach_mixture=False, alpha_rows=None,
            cap=student.new_zeros(self.call.hidden.shape[0], dtype=loss_dtype(student.dtype)),
        )  # fmt: skip
        return _divergence(alone, student, student.new_zeros(rows, 1), part, need_gradient)


def _divergence(
    call: LinearDivergenceCall, student: Tensor, teacher: Tensor, part: slice, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[part]

    loss, gradient, _ = torch.ops.distillm_ext.divergence(
        student, teacher, rows(call.labels), rows(call.row_weight), rows(call.alpha_rows), rows(call.cap),
        call.divergence, call.alpha, call.beta, call.temperature, call.ce_weight, call.ignore_index,
        call.detach_mixture, 0, need_gradient, False,
    )  # fmt: skip
    return loss, gradient


# acc [v, H] (+)= scale * gradient [n, v]^T hidden [n, H], the product formed in float32 from narrower factors.
Accumulate = Callable[[Tensor, Tensor, Tensor, float, bool], None]


def _accumulate_cpu(acc: Tensor, gradient: Tensor, hidden: Tensor, scale: float, first: bool) -> None:
    # No product of narrow matrices on the CPU has a float32 result: the factors are converted.
    acc.addmm_(gradient.t().to(acc.dtype), hidden.to(acc.dtype), beta=0 if first else 1, alpha=scale)


def _accumulate_cuda(acc: Tensor, gradient: Tensor, hidden: Tensor, scale: float, first: bool) -> None:
    product = torch.mm(gradient.t(), hidden, out_dtype=acc.dtype)
    if first:
        torch.mul(product, scale, out=acc)
    else:
        acc.add_(product, alpha=scale)


class _Gradients:
    """Gradients of one call, for the rows that count; weight and bias accumulate in float32 (float64 for float64)."""

    def __init__(self, call: LinearDivergenceCall, original: LinearDivergenceCall, accumulate: Accumulate) -> None:
        self.call, self.original, self.accumulate = call, original, accumulate
        self.needed = not call.per_row and (call.need_hidden or call.need_weight or call.need_bias)
        self.hidden, self.weight, self.bias = (call.hidden.new_empty(0) for _ in range(3))
        if not self.needed:
            return
        wide = loss_dtype(call.dtype)
        if call.need_hidden:
            self.hidden = torch.empty_like(call.hidden, memory_format=torch.contiguous_format)
        if call.need_weight:
            whole = original.weight.shape
            # The first chunk writes what it covers.
            covered = call.hidden.shape[0] > 0 and call.weight.shape[0] == whole[0]
            make = call.weight.new_empty if covered else call.weight.new_zeros
            self.weight = make(whole, dtype=wide)
        if call.need_bias:
            self.bias = call.weight.new_zeros(original.weight.shape[0], dtype=wide)

    def add(self, part: slice, gradient: Tensor) -> None:
        """Takes the gradient [n, V] of the logits of rows `part`."""
        call, vocab = self.call, gradient.shape[1]
        if call.need_hidden:
            self.hidden[part].addmm_(gradient, call.weight, beta=0, alpha=call.scale)
        if call.need_bias:
            self.bias[:vocab].add_(gradient.sum(0, dtype=self.bias.dtype), alpha=call.scale)
        if not call.need_weight:
            return
        hidden, first = call.hidden[part], part.start == 0
        if self.weight.dtype == gradient.dtype:
            self.weight[:vocab].addmm_(gradient.t(), hidden, beta=0 if first else 1, alpha=call.scale)
            return
        for begin in range(0, vocab, _TILE):
            tile = slice(begin, min(begin + _TILE, vocab))
            self.accumulate(self.weight[tile], gradient[:, tile], hidden, call.scale, first)

    def result(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes and shapes of hidden, weight and bias; [0] where not needed."""
        original, call = self.original, self.call
        hidden = self.hidden.to(original.hidden.dtype)
        if self.needed and call.need_hidden:
            hidden = _spread(hidden, rows, original.hidden.shape[0])
        bias_dtype = original.weight.dtype if original.bias is None else original.bias.dtype
        return hidden, self.weight.to(original.weight.dtype), self.bias.to(bias_dtype)


def _spread(values: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """The values of the rows that count among all rows, 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros((total, *values.shape[1:])).index_copy_(0, rows, values)


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
        labels=take(call.labels), row_weight=take(call.row_weight), alpha_rows=take(call.alpha_rows),
        cap=take(call.cap),
    )  # fmt: skip


def _chunk_size(call: LinearDivergenceCall, gradient: bool) -> int:
    """Rows per chunk, all chunks alike."""
    rows = call.hidden.shape[0]
    row_bytes = call.weight.shape[0] * call.dtype.itemsize * (2 if gradient else 1)
    if call.teacher is not None:
        width = call.teacher.shape[1] if call.teacher_weight is None else call.teacher_weight.shape[0]
        row_bytes += width * call.teacher.dtype.itemsize
    automatic = max(MIN_CHUNK_ROWS, MEMORY_BUDGET // row_bytes)
    chunks = -(-rows // (call.chunk_rows or automatic))
    return -(-rows // max(chunks, 1))


def _run(original: LinearDivergenceCall, rows: Tensor | None, accumulate: Accumulate) -> tuple[Tensor, ...]:
    call = _prepared(original, rows)
    gradients = _Gradients(call, original, accumulate)
    size = _chunk_size(call, gradients.needed)
    student_buffer, teacher_buffer = call.weight.new_empty(size, call.weight.shape[0]), None
    if call.teacher_weight is not None:
        teacher_buffer = call.teacher_weight.new_empty(size, call.teacher_weight.shape[0])
    chunks = _Chunks(call, rows, size, student_buffer, teacher_buffer)
    parts = [chunks.run(begin, gradients) for begin in range(0, call.hidden.shape[0], max(size, 1))]
    empty = call.weight.new_empty(0, dtype=loss_dtype(call.dtype))
    loss = torch.cat([empty, *(part[0] for part in parts)])
    ce = torch.cat([empty, *(part[1] for part in parts)]) if call.need_ce else torch.zeros_like(loss)
    if call.per_row:
        loss, ce = (_spread(x, rows, original.hidden.shape[0]) for x in (loss, ce))
    else:
        loss, ce = loss.sum(), ce.sum()
    return loss, ce, *gradients.result(rows)


def linear_divergence_cpu(*arguments: Any) -> tuple[Tensor, ...]:
    call = LinearDivergenceCall(*arguments)
    rows, counted = call.rows, _counted(call)
    if counted is not None:
        # Rows that do not count never meet a head. On the host this costs a look at R flags.
        rows = counted.nonzero().squeeze(1) if rows is None else rows[counted[rows]]
        rows = None if len(rows) == len(counted) and call.rows is None else rows
    return _run(call, rows, _accumulate_cpu)


def linear_divergence_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    call = LinearDivergenceCall(*arguments)
    counted = _counted(call)
    if counted is not None:
        # Their number is not known on the host, so they stay; a NaN in one must not meet its zero gradient.
        call = call._replace(hidden=call.hidden.masked_fill(~counted.unsqueeze(-1), 0))
    return _run(call, call.rows, _accumulate_cuda)
