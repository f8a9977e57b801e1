"""TRL's `GKDTrainer.generalized_jsd_loss` over our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.logits import SideRows, check_logits
from ..checks.options import checked_options
from ..functional import distillation_loss
from ..ops.divergence import loss_dtype
from .entries import generalized_js_entries


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Generalized Jensen-Shannon divergence with TRL's arguments.

    `beta` weights the teacher; 0 is KL(teacher || student), 1 is KL(student || teacher). The gradient flows to
    `student_logits` alone.

    Args:
        student_logits, teacher_logits: [B, S, V], positions aligned.
        labels: [B, S]; -100 marks positions to leave out.
        beta: in [0, 1].
        temperature: divides both logits; no T^2 factor.
        reduction: "batchmean" (over the labelled positions, or over B without labels), "sum", or "mean" (over the
            labelled positions times V, or over all entries). "none": the summands, entry by entry, [B, S, V], or
            [positions with a label, V]. No kernel serves that: it is a formula of PyTorch operations, which with their
            backward pass read or write a tensor of the logits' size about 125 times (40 at beta 0 and 1; the other
            reductions: 3) and keep about 7 of them, in float32, for the backward pass (3; the others: 1, the
            gradient). With labels it waits for the device to count them.
        num_items_in_batch: divides the sum, whatever the reduction.

    Returns:
        A scalar, or the entries; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Example:
        >>> generalized_jsd_loss(torch.randn(2, 5, 100), torch.randn(2, 5, 100), beta=0.5).shape
        torch.Size([])
    """
    if reduction not in ("batchmean", "sum", "mean", "none"):
        raise ValueError(f"reduction must be 'batchmean', 'sum', 'mean' or 'none', got {reduction!r}.")
    if reduction == "none" and num_items_in_batch is None:
        return _entries(student_logits, teacher_logits, labels, beta, temperature)
    divisor: int | Tensor = 1
    if num_items_in_batch is not None:
        divisor = num_items_in_batch
    elif reduction != "sum":
        divisor = max(student_logits.shape[0], 1) if labels is None else (labels != -100).sum().clamp(min=1)
        if reduction == "mean":
            positions = divisor if labels is not None else student_logits[..., 0].numel()
            divisor = positions * student_logits.shape[-1]
    return distillation_loss(
        student_logits,
        teacher_logits,
        labels,
        divergence="generalized_js",
        beta=beta,
        temperature=temperature,
        num_items=divisor if isinstance(divisor, Tensor) else torch.tensor(divisor, device=student_logits.device),
    )


def _entries(student: Tensor, teacher: Tensor, labels: Tensor | None, beta: float, temperature: float) -> Tensor:
    """The summands of every position, or [N, V] of those with a label."""
    check_logits(student, teacher)
    checked_options("generalized_js", None, beta, temperature, 0.0, -100, False)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits for reduction='none', {list(student.shape)}, got "
            f"{list(teacher.shape)}; cut both to the entries that both have."
        )
    dtype = loss_dtype(student.dtype)
    flat_labels = SideRows(student, dtype)(labels, "labels", integer=True)
    if flat_labels is not None:
        kept = (flat_labels != -100).reshape(student.shape[:-1])
        student, teacher = student[kept], teacher[kept]
    log_q, log_p = ((z.to(dtype) / temperature).log_softmax(-1) for z in (student, teacher.detach()))
    return generalized_js_entries(log_p, log_q, beta)
