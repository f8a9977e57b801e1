"""What losses take and return beside tensors: data only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .compressed_logits import CompressedLogits

__all__ = ["CompressedLogits", "DivergenceMetrics", "LinearHead", "SampledTokens", "TeacherHead"]


@dataclass(frozen=True, eq=False)
class LinearHead:
    r"""Hidden states and the language-model head that turns them into logits, which are not formed yet.

    With :math:`z = h W^\top + b` the logits are :math:`\mathrm{scale} \cdot z`, or
    :math:`\mathrm{softcap} \cdot \tanh(\mathrm{scale} \cdot z / \mathrm{softcap})`.

    Attributes:
        hidden: [..., H], one hidden state per position.
        weight: [V, H].
        bias: [V], or None.
        softcap: bound of the logits (Gemma 2: 30), or None.
        scale: factor on the head's output (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class TeacherHead(LinearHead):
    """The teacher's side of `linear_distillation_loss`. Hidden size and vocabulary may differ from the student's.

    Its logits are formed in the dtype of its weight, whatever the autocast context, and no gradient flows to it.

    Example:
        >>> teacher = TeacherHead(torch.randn(2, 8, 64), torch.randn(32000, 64))
    """


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """One drawn token per row, as `sample_tokens` returns it.

    Attributes:
        tokens: [rows] int64; 0 where not valid.
        logprobs: [rows] float32, log-probability under softmax(logits), in nats; NaN where not valid.
        filtered_logprobs: [rows] float32, log-probability under the distribution that was drawn from.
        valid: [rows] bool; False for a row without a legal token or with illegal parameters.

    Example:
        >>> drawn = sample_tokens(torch.randn(2, 32000), seed=1, position=0)
        >>> bool(drawn.valid.all())
        True
    """

    tokens: Tensor
    logprobs: Tensor
    filtered_logprobs: Tensor
    valid: Tensor


@dataclass(frozen=True, eq=False)
class DivergenceMetrics:
    """What `return_metrics=True` adds to a loss, from the same call; detached.

    Positions that are left out (ignored label, weight 0) read 0, those whose loss is NaN read NaN.

    Attributes:
        teacher_entropy: [...], nats, at the temperature of the loss.
        student_entropy: [...], likewise.
        top1_agreement: [...], 1 where both sides have their largest logit at the same entry (of equal ones the first),
            else 0.
    """

    teacher_entropy: Tensor
    student_entropy: Tensor
    top1_agreement: Tensor

    @staticmethod
    def from_rows(rows: Tensor, shape: torch.Size) -> DivergenceMetrics:
        """From the operators' [R, 3], for positions of the given shape."""
        teacher, student, agreement = (column.reshape(shape) for column in rows.unbind(1))
        return DivergenceMetrics(teacher, student, agreement)
