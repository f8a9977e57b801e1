"""Distillation losses from hidden states: the heads are part of the loss, logits exist a chunk of rows at a time.

Checks arguments once, flattens positions to rows, calls the operator. Options and row weights: see `functional`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .checks.compressed import checked_compressed
from .checks.heads import check_devices, checked_chunk, checked_sides
from .checks.logits import check_tail
from .checks.options import check_powers, checked_options
from .checks.sides import LossRequest, row_sides
from .compressed_logits import CompressedLogits
from .containers import DivergenceMetrics, LinearHead, TeacherHead
from .ops.divergence import CROSS_ENTROPY, DivergenceOptions
from .ops.linear.call import HeadRows, LinearDivergenceCall
from .ops.linear.operator import linear_divergence
from .ops.sparse_divergence import CompressedRows


class LinearParts(NamedTuple):
    """What one pass over the chunks gives."""

    loss: Tensor  # [], or [...] for reduction "none"
    ce: Tensor  # likewise
    metrics: DivergenceMetrics | None


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
    options = checked_options(
        divergence, alpha=alpha, beta=beta, temperature=temperature, ce_weight=ce_weight, ignore_index=ignore_index,
        detach_mixture=detach_mixture,
    )  # fmt: skip
    check_tail(tail, isinstance(teacher, CompressedLogits))
    request = LossRequest(labels, weight, alpha, cap, reduction, num_items, vocab_size, tail, return_metrics, rows)
    parts = linear_loss(student, teacher, options, request, chunk_rows=chunk_rows)
    return (parts.loss, parts.metrics) if parts.metrics is not None else parts.loss


def linear_cross_entropy_loss(
    student: LinearHead, labels: Tensor, *, reduction: str = "mean", num_items: int | Tensor | None = None
) -> Tensor:
    """Cross-entropy of a head's logits with labels [...], -100 where there is none; logits exist by the chunk.

    Reductions, memory and gradients are those of `linear_distillation_loss`.
    """
    request = LossRequest(labels, reduction=reduction, num_items=num_items)
    return linear_loss(student, None, CROSS_ENTROPY, request).loss


def linear_loss(
    student: LinearHead,
    teacher: LinearHead | Tensor | CompressedLogits | None,
    options: DivergenceOptions,
    request: LossRequest,
    *,
    chunk_rows: int | None = None,
    need_ce: bool = False,
) -> LinearParts:
    """`linear_distillation_loss` from objects, and with it, detached, the cross-entropy with labels: same reduction,
    without its weight.

    The cross-entropy costs one more look at the logits of each chunk; without ``need_ce`` it is 0. Without a teacher
    the loss is the cross-entropy alone, and `CROSS_ENTROPY` the options.
    """
    head = None if isinstance(teacher, CompressedLogits) else teacher
    dtype = checked_sides(student, head, options, request.vocab_size)
    check_powers(options, request.alpha, dtype)
    shape, device = student.hidden.shape[:-1], student.hidden.device
    like = torch.empty((*shape, 0), dtype=dtype, device=device)  # positions of logits, without any
    labels, weight, alpha, cap, *_ = request
    check_devices(device, labels=labels, weight=weight, alpha=alpha, cap=cap, rows=request.rows)
    sides = row_sides(request, options, like)
    teacher_rows: HeadRows | CompressedRows | Tensor | None
    if isinstance(teacher, CompressedLogits):
        teacher_rows = checked_compressed(teacher, options, request, like, student.weight.shape[0])
    else:
        teacher_rows = _teacher_rows(teacher)
    call = LinearDivergenceCall(
        _head_rows(student), teacher_rows, sides, options, request.rows, dtype,
        checked_chunk(chunk_rows), request.vocab_size or 0, per_row=request.reduction == "none", need_ce=need_ce,
        need_metrics=request.return_metrics, need_hidden=_needs(student.hidden), need_weight=_needs(student.weight),
        need_bias=_needs(student.bias),
    )  # fmt: skip
    loss, ce, row_metrics = linear_divergence(call)
    metrics = DivergenceMetrics.from_rows(row_metrics, shape) if request.return_metrics else None
    if call.per_row:
        loss, ce = loss.reshape(shape), ce.reshape(shape)
    return LinearParts(loss, ce, metrics)


def _head_rows(head: LinearHead) -> HeadRows:
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    return HeadRows(hidden, head.weight, head.bias, float(head.scale), float(head.softcap or 0.0))


def _teacher_rows(teacher: LinearHead | Tensor | None) -> HeadRows | Tensor | None:
    """The teacher as the operator takes it; no gradient flows to it."""
    if teacher is None:
        return None
    if isinstance(teacher, Tensor):
        return teacher.detach().reshape(-1, teacher.shape[-1])
    hidden, weight, bias, scale, softcap = _head_rows(teacher)
    return HeadRows(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), scale, softcap)


def _needs(x: Tensor | None) -> bool:
    return x is not None and torch.is_grad_enabled() and x.requires_grad
