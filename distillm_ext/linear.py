"""Distillation losses from hidden states: the heads are part of the loss, logits exist a chunk of rows at a time.

Checks arguments once, flattens positions to rows, calls the operator. Options and row weights: see `functional`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .checks.compressed import checked_compressed
from .checks.heads import check_devices, checked_chunk, checked_rows, checked_sides
from .checks.logits import SideRows, cap_tensor, check_tail, weight_of_rows
from .checks.options import check_powers, checked_options
from .compressed_logits import CompressedLogits
from .containers import DivergenceMetrics, LinearHead, TeacherHead
from .ops.divergence import DivergenceOptions, RowSides, loss_dtype, row_count
from .ops.linear_call import LinearDivergenceCall
from .ops.linear_divergence import linear_divergence


class LinearParts(NamedTuple):
    """What one pass over the chunks gives."""

    loss: Tensor  # [], or [...] for reduction "none"
    ce: Tensor  # likewise
    metrics: DivergenceMetrics | None


# Of cross-entropy alone, where no divergence is formed.
_NO_DIVERGENCE = DivergenceOptions("total_variation", 0.0, 0.0, 1.0, 1.0, -100, False)


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TeacherHead | Tensor | CompressedLogits,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Any,
) -> tuple[Tensor, DivergenceMetrics]: ...


@overload
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TeacherHead | Tensor | CompressedLogits,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


# The overloads tell the return type alone; the options are those here.
def linear_distillation_loss(  # type: ignore[misc]
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TeacherHead | Tensor | CompressedLogits,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
    divergence: str = "skew_kl",
    alpha: float | Tensor | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    cap: float | Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    ce_weight: float = 0.0,
    detach_mixture: bool = False,
    tail: str = "bucket",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, DivergenceMetrics]:
    r"""`distillation_loss` fused with the language-model heads: no logits are kept, for either side.

    With :math:`z = h W^\top + b` the student's logits are :math:`\mathrm{scale} \cdot z`, or with a soft-cap
    :math:`c \tanh(\mathrm{scale} \cdot z / c)`, and the loss is that of `distillation_loss` on them. Logits are formed
    for a chunk of rows, their gradient goes on to hidden states, weight and bias, and the next chunk takes its place:
    the memory beyond inputs and gradients is that of ``chunk_rows`` logits of both sides, the student's of which become
    their gradient (as in Liger Kernel, Hsu et al., 2024, for hard labels); a soft-cap adds an eighth of them.

    Gradients are formed in the forward pass, those that are needed, and only where gradients are enabled. Those of
    weight and bias accumulate in float32: for a narrower weight that is another [V, H] of memory, in float16 until the
    backward pass. The backward pass multiplies them by the upstream gradient; a unit one costs nothing.
    ``reduction="none"`` has an upstream gradient per position, which the weight's gradient needs to know: its backward
    pass computes the logits again.

    A NaN in the hidden state of one position makes its loss and its hidden gradient NaN, and no other position's; the
    gradients of weight and bias sum over positions and are NaN then.

    Under autocast the student's product is computed in the autocast dtype; gradients have the dtype of what they
    belong to. Under FSDP and DDP call it inside the forward of the module that owns the weight.

    Args:
        student_hidden: [..., H], float32, bfloat16 or float16 (float64 on the CPU).
        student_weight: [V, H], in the dtype of ``student_hidden`` unless autocast is on.
        teacher: a `TeacherHead`, whose hidden size and vocabulary may differ, teacher logits [..., Vt], or
            `CompressedLogits`, of the same positions and device.
        labels: [...], integer; positions equal to ``ignore_index`` contribute exactly 0, NaN or not. On the CPU they
            meet neither head; see ``rows``.
        student_bias: [V].
        logit_softcap: c > 0, None for none.
        logit_scale: factor on the student's logits, > 0.
        chunk_rows: the most rows whose logits exist at a time; None: as many as 256 MiB hold (at least 16).
        rows: [n] int64 indices into the flattened positions, distinct (checked on the CPU alone): the positions to look
            at; all others count as ignored. On the CPU the operator finds them itself. On CUDA that would wait for the
            device: an index made where the batch is collated keeps ignored positions out of the products; without it
            they take part and their gradient is 0.
        divergence, alpha, beta, temperature, weight, cap, ignore_index, reduction, ce_weight, detach_mixture, tail,
            num_items, vocab_size, return_metrics: see `distillation_loss`.

    Returns:
        Scalar, or [...] for reduction "none"; float32 (float64 for float64 input). With ``return_metrics`` a pair of
        that and `DivergenceMetrics`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, name or range.

    Example:
        >>> hidden, weight = torch.randn(2, 8, 64, requires_grad=True), torch.randn(32000, 64, requires_grad=True)
        >>> teacher = TeacherHead(torch.randn(2, 8, 128), torch.randn(32000, 128))
        >>> linear_distillation_loss(hidden, weight, teacher, divergence="skew_kl", alpha=0.1).backward()
    """
    if teacher is None:
        raise TypeError("teacher must be a TeacherHead, CompressedLogits or a tensor of logits, got NoneType.")
    student = LinearHead(student_hidden, student_weight, student_bias, logit_softcap, logit_scale)
    options = checked_options(divergence, alpha, beta, temperature, ce_weight, ignore_index, detach_mixture)
    check_tail(tail, isinstance(teacher, CompressedLogits))
    parts = _linear_loss(
        student, teacher, options, labels, tail=tail, weight=weight, alpha=alpha, cap=cap, rows=rows,
        reduction=reduction, num_items=num_items, vocab_size=vocab_size, chunk_rows=chunk_rows,
        need_metrics=return_metrics,
    )  # fmt: skip
    return (parts.loss, parts.metrics) if parts.metrics is not None else parts.loss


def linear_distillation_parts(
    student: LinearHead,
    teacher: LinearHead | Tensor | CompressedLogits,
    labels: Tensor,
    *,
    divergence: str,
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    tail: str = "bucket",
    need_ce: bool = True,
    need_metrics: bool = False,
) -> LinearParts:
    """`linear_distillation_loss` and, detached, the cross-entropy with labels: same reduction, without its weight.

    The cross-entropy costs one more look at the logits of each chunk; without ``need_ce`` it is 0.
    """
    options = checked_options(divergence, alpha, beta, temperature, ce_weight, -100, False)
    return _linear_loss(
        student, teacher, options, labels, reduction=reduction, num_items=num_items, vocab_size=vocab_size,
        alpha=alpha, tail=tail, need_ce=need_ce, need_metrics=need_metrics,
    )  # fmt: skip


def linear_cross_entropy_loss(
    student: LinearHead, labels: Tensor, *, reduction: str = "mean", num_items: int | Tensor | None = None
) -> Tensor:
    """Cross-entropy of a head's logits with labels [...], -100 where there is none; logits exist by the chunk.

    Reductions, memory and gradients are those of `linear_distillation_loss`.
    """
    return _linear_loss(student, None, _NO_DIVERGENCE, labels, reduction=reduction, num_items=num_items).loss


def _linear_loss(
    student: LinearHead,
    teacher: LinearHead | Tensor | CompressedLogits | None,
    options: DivergenceOptions,
    labels: Tensor | None,
    *,
    tail: str = "bucket",
    weight: Tensor | None = None,
    alpha: float | Tensor | None = None,
    cap: float | Tensor | None = None,
    rows: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    need_ce: bool = False,
    need_metrics: bool = False,
) -> LinearParts:
    compressed = teacher if isinstance(teacher, CompressedLogits) else None
    head = None if isinstance(teacher, CompressedLogits) else teacher
    dtype = checked_sides(student, head, options, vocab_size)
    check_powers(options, alpha, dtype)
    if options.ce_weight != 0 and labels is None:
        raise ValueError("ce_weight needs labels: pass labels of the positions or set ce_weight=0.")
    shape = student.hidden.shape[:-1]
    like = torch.empty((*shape, 0), dtype=dtype, device=student.hidden.device)  # positions of logits, without any
    check_devices(like.device, labels=labels, weight=weight, alpha=alpha, cap=cap, rows=rows)
    sides = _row_sides(like, labels, weight, alpha, cap, rows, reduction, num_items, options.ignore_index)
    teacher_rows, teacher_weight, teacher_bias, teacher_softcap, teacher_scale = _teacher_arguments(head)
    kept, kept_vocab = _kept_arguments(compressed, student, options, tail, vocab_size, like, need_metrics)
    call = LinearDivergenceCall(
        student.hidden.reshape(-1, student.hidden.shape[-1]), student.weight, student.bias,
        teacher_rows, teacher_weight, teacher_bias, *kept, *sides, rows,
        float(student.scale), float(student.softcap or 0.0), teacher_scale, teacher_softcap, options.divergence,
        options.alpha, options.beta, options.temperature, options.ce_weight, options.ignore_index,
        options.detach_mixture, tail, kept_vocab, dtype, checked_chunk(chunk_rows), vocab_size or 0,
        reduction == "none", need_ce, need_metrics, _needs(student.hidden), _needs(student.weight),
        _needs(student.bias),
    )  # fmt: skip
    loss, ce, row_metrics = linear_divergence(call)
    metrics = DivergenceMetrics.from_rows(row_metrics, shape) if need_metrics else None
    if reduction == "none":
        loss, ce = loss.reshape(shape), ce.reshape(shape)
    return LinearParts(loss, ce, metrics)


def _row_sides(
    like: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    alpha: float | Tensor | None,
    cap: float | Tensor | None,
    rows: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
    ignore_index: int,
) -> RowSides:
    """Labels, weights, alpha and cap of the rows, as the operator takes them."""
    flat = SideRows(like, loss_dtype(like.dtype))
    flat_labels, flat_weight = flat(labels, "labels", integer=True), flat(weight, "weight")
    if rows is not None:
        flat_weight = _only(checked_rows(rows, row_count(like.shape[:-1])), flat_weight, like)
    return RowSides(
        flat_labels,
        weight_of_rows(flat_weight, flat_labels, like.shape[:-1], like, reduction, num_items, ignore_index),
        flat(alpha if isinstance(alpha, Tensor) else None, "alpha"),
        flat(cap_tensor(cap, like), "cap"),
    )


def _needs(x: Tensor | None) -> bool:
    return x is not None and torch.is_grad_enabled() and x.requires_grad


def _teacher_arguments(
    teacher: LinearHead | Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, float]:
    """Rows, weight, bias, softcap and scale as the operator takes them."""
    if teacher is None:
        return None, None, None, 0.0, 1.0
    if isinstance(teacher, Tensor):
        return teacher.detach().reshape(-1, teacher.shape[-1]), None, None, 0.0, 1.0
    bias = None if teacher.bias is None else teacher.bias.detach()
    hidden = teacher.hidden.detach().reshape(-1, teacher.hidden.shape[-1])
    return hidden, teacher.weight.detach(), bias, float(teacher.softcap or 0.0), float(teacher.scale)


_Kept = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _kept_arguments(
    teacher: CompressedLogits | None,
    student: LinearHead,
    options: DivergenceOptions,
    tail: str,
    vocab_size: int | None,
    like: Tensor,
    need_metrics: bool,
) -> tuple[_Kept, int]:
    """A compressed teacher's tensors as the operator takes them, and its vocabulary."""
    if teacher is None:
        return (None, None, None, None, None), 0
    if need_metrics:
        raise ValueError("return_metrics needs the teacher's logits; CompressedLogits do not determine its entropy.")
    rows = checked_compressed(
        teacher, options, tail, like.shape[:-1], student.weight.shape[0], vocab_size, like.dtype, like.device
    )
    return (rows.ids, rows.logprobs, rows.log_norm, rows.tail_logprob, rows.counts), rows.vocab_size


def _only(rows: Tensor, weight: Tensor | None, like: Tensor) -> Tensor:
    """Row weights that are 0 outside of `rows`: what is not looked at must not enter the mean's divisor."""
    listed = torch.zeros(row_count(like.shape[:-1]), dtype=loss_dtype(like.dtype), device=like.device)
    listed = listed.index_fill(0, rows, 1.0)
    return listed if weight is None else torch.where(listed > 0, weight, listed)
