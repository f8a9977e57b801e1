"""Objectives: what one optimizer step minimises, given logits. They know nothing of where the tokens came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distillm_ext.losses import DistillationLoss


@dataclass
class LossParts:
    """A loss and what it is made of.

    Attributes:
        total: scalar that is differentiated.
        parts: detached float32 scalars by name ("divergence", "ce", "lm"), in the same normalisation.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def cross_entropy(logits: Tensor, targets: Tensor, num_items: int | Tensor) -> Tensor:
    """Σ −log softmax(logits)[target] / num_items, in float32; 0 for no rows.

    Args:
        logits: [R, V].
        targets: [R] int64.
        num_items: normaliser, usually the targets of the whole optimizer step on all ranks.
    """
    return functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum") / num_items


@dataclass(frozen=True)
class CrossEntropyObjective:
    """Supervised fine-tuning: next-token cross-entropy. Needs no teacher."""

    needs_teacher = False

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, *, num_items: int | Tensor, ground_truth: bool
    ) -> LossParts:
        """See `DivergenceObjective.__call__`; `teacher` and `ground_truth` are not looked at."""
        total = cross_entropy(student, targets, num_items)
        return LossParts(total, {"ce": total.detach()})


class DivergenceObjective:
    """D(teacher, student) + ce_weight · cross-entropy.

    Args:
        divergence, alpha, beta, temperature: see `distillm_ext.distillation_loss`; None is the published default.
        ce_weight: weight of the cross-entropy with the targets.
        vocab_size: entries of both vocabularies that are compared.
    """

    needs_teacher = True

    def __init__(
        self,
        divergence: str,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float = 1.0,
        *,
        ce_weight: float = 0.0,
        vocab_size: int | None = None,
    ) -> None:
        parameters = {"alpha": alpha, "beta": beta, "temperature": temperature, "vocab_size": vocab_size}
        options: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
        self.ce_weight = ce_weight
        self.vocab_size = vocab_size
        self.divergence = DistillationLoss(divergence, **options)
        self.with_ce = DistillationLoss(divergence, ce_weight=ce_weight, **options)

    def __call__(
        self, student: Tensor, teacher: Tensor | None, targets: Tensor, *, num_items: int | Tensor, ground_truth: bool
    ) -> LossParts:
        """Computes the loss of one micro-batch.

        Args:
            student: [R, V] logits, differentiable.
            teacher: [R, V_teacher] logits.
            targets: [R] int64.
            num_items: the normaliser, global over the optimizer step.
            ground_truth: whether the targets come from the data set or the teacher. A student's own samples are no
                truth to fit, so the cross-entropy is left out for them.

        Returns:
            `LossParts` with "divergence", and "ce" where it has a weight.
        """
        assert teacher is not None  # needs_teacher
        targets, teacher = targets.to(student.device), teacher.to(student.device)
        if self.ce_weight == 0.0 or not ground_truth:
            total = self.divergence(student, teacher, targets, num_items=num_items)
            return LossParts(total, {"divergence": total.detach()})
        total = self.with_ce(student, teacher, targets, num_items=num_items)
        with torch.no_grad():
            ce = cross_entropy(student[:, : self.vocab_size], targets, num_items)
        return LossParts(total, {"divergence": total.detach() - self.ce_weight * ce, "ce": ce})


Objective = CrossEntropyObjective | DivergenceObjective


@dataclass(frozen=True)
class ObjectiveSchedule:
    """A warm-up objective for the first steps, then the main one.

    A student cut from its teacher starts with q ≪ p, where the gradient of skew KL vanishes: cross-entropy or forward
    KL must first bring it near.
    """

    main: Objective
    warmup: Objective | None = None
    warmup_steps: int = 0

    @property
    def steps_before_main(self) -> int:
        """Optimizer steps of the warm-up; the data policy counts its own steps from there."""
        return self.warmup_steps if self.warmup is not None else 0

    def warming_up(self, step: int) -> bool:
        """Whether optimizer step `step` (0-based) belongs to the warm-up."""
        return step < self.steps_before_main

    def at(self, step: int) -> Objective:
        """The objective of optimizer step `step`."""
        return self.warmup if self.warmup is not None and step < self.warmup_steps else self.main
