"""TRL's `GKDTrainer.generalized_jsd_loss` over our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import distillation_loss


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

    `beta` weights the teacher; 0 is KL(teacher || student), 1 is KL(student || teacher).

    Args:
        student_logits, teacher_logits: [B, S, V], positions aligned.
        labels: [B, S]; -100 marks positions to leave out.
        beta: in [0, 1].
        temperature: divides both logits; no T^2 factor.
        reduction: "batchmean" (over the labelled positions, or over B without labels), "sum", or "mean" (over the
            labelled positions times V, or over all entries). TRL's "none", which is per entry, is not offered.
        num_items_in_batch: divides the sum, whatever the reduction.

    Example:
        >>> generalized_jsd_loss(torch.randn(2, 5, 100), torch.randn(2, 5, 100), beta=0.5).shape
        torch.Size([])
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'mean', got {reduction!r}.")
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
