"""Operator `logprob_divergence`: typed call, fake, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import register_row_gradient, row_outputs


def logprob_divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    divergence: str,
    *,
    beta: float = 0.5,
    probability_floor: float | None = None,
) -> Tensor:
    """Losses [R] of log-probabilities [R, V] against the teacher's, each entry a variable of its own.

    Differentiable in `student`. Row r is weight_r sum_v value_v; nothing is normalised, so that by log q_v the gradient
    is weight_r G_v (csrc/math/logprob_divergence.h). Rows of weight 0 are exactly 0 and are not read. `divergence`:
    forward_kl, reverse_kl, or generalized_js with the teacher's weight `beta` between 0 and 1. With `probability_floor`
    the teacher's entries are probabilities, whose logarithm is taken of at least that; for forward_kl alone.
    """
    need_gradient = torch.is_grad_enabled() and student.requires_grad
    return torch.ops.distillm_ext.logprob_divergence(
        student, teacher, weight, divergence, beta, probability_floor, need_gradient
    )[0]


@torch.library.register_fake("distillm_ext::logprob_divergence")
def _logprob_divergence_fake(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    divergence: str,
    beta: float,
    probability_floor: float | None,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss, _ = row_outputs(student, need_metrics=False)
    return loss, student.new_empty(student.shape if need_gradient else (0,))


register_row_gradient("logprob_divergence")
