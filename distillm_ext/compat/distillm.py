"""The losses of DistiLLM's published code over our kernels.

Every function takes (logits, teacher_logits, no_model_batch) with `no_model_batch["label"]`, -100 at positions to
leave out, and returns the mean over the others. Gradients are those of that code. Values are true divergences: its
`forward_kl` and `skewed_forward_kl` leave out the teacher's entropy, which is constant, and so are larger by it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..functional import distillation_loss

Batch = Mapping[str, Tensor]


def forward_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch) -> Tensor:
    """KL(teacher || student)."""
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="forward_kl")


def reverse_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch) -> Tensor:
    """KL(student || teacher)."""
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="reverse_kl")


def symmetric_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.9) -> Tensor:
    """(1 - lam) KL(teacher || student) + lam KL(student || teacher)."""
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="symmetric_kl", beta=lam)


def js_distance(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.9) -> Tensor:
    """(1 - lam) KL(teacher || m) + lam KL(student || m), m = (1 - lam) teacher + lam student: our beta is 1 - lam.

    At lam = 0 and 1 the mixture is one of the sides and the distance 0, where generalized_js has its limits.
    """
    if lam in (0, 1):
        nothing = logits.new_zeros(logits.shape[:-1])
        return distillation_loss(
            logits, teacher_logits, no_model_batch["label"], divergence="total_variation", weight=nothing
        )
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="generalized_js", beta=1 - lam)


def tv_distance(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch) -> Tensor:
    """Total variation, half the L1 distance."""
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="total_variation")


def skewed_forward_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.1) -> Tensor:
    """KL(teacher || lam teacher + (1 - lam) student)."""
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="skew_kl", alpha=lam)


def skewed_reverse_kl(logits: Tensor, teacher_logits: Tensor, no_model_batch: Batch, lam: float = 0.1) -> Tensor:
    """KL(student || (1 - lam) teacher + lam student)."""
    return distillation_loss(logits, teacher_logits, no_model_batch["label"], divergence="skew_reverse_kl", alpha=lam)
