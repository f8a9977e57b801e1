"""Objectives: what one optimizer step minimises, given logits, or the heads that make them: then the loss is fused with
the heads and no logits are kept. They know nothing of where the tokens came from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from distillm_ext.checks.sides import LossRequest
from distillm_ext.compressed_logits import CompressedLogits
from distillm_ext.containers import DivergenceMetrics, LinearHead
from distillm_ext.functional import logits_loss
from distillm_ext.linear import linear_cross_entropy_loss, linear_loss
from distillm_ext.models.logit_reader import StudentOutput, TeacherOutput, head_logits
from distillm_ext.models.router_loss import ModelLoss
from distillm_ext.ops.divergence import DivergenceOptions
from distillm_ext.training.meters import METRICS


@dataclass
class LossParts:
    """A loss and what it is made of.

    Attributes:
        total: scalar that is differentiated.
        parts: detached scalars by name ("divergence", "ce", "lm", "router" and the fields of `DivergenceMetrics`), in
            the same normalisation.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def plus(self, own: ModelLoss) -> LossParts:
        """With a term that the student's model adds by itself."""
        return LossParts(self.total + own.term.to(self.total), {**self.parts, own.name: own.value})


def cross_entropy(logits: StudentOutput, targets: Tensor, num_items: int | Tensor) -> Tensor:
    """Σ −log softmax(logits)[target] / num_items, in float32; 0 for no rows.

    Args:
        logits: [R, V], or the head that makes them.
        targets: [R] int64.
        num_items: normaliser, usually the targets of the whole optimizer step on all ranks.
    """
    if isinstance(logits, LinearHead):
        return linear_cross_entropy_loss(logits, targets.to(logits.hidden.device), num_items=num_items)
    return functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum") / num_items


@dataclass(frozen=True)
class CrossEntropyObjective:
    """Supervised fine-tuning: next-token cross-entropy. Needs no teacher."""

    needs_teacher = False

    def __call__(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        targets: Tensor,
        *,
        num_items: int | Tensor,
        ground_truth: bool,
    ) -> LossParts:
        """See `DivergenceObjective.__call__`; `teacher` and `ground_truth` are not looked at."""
        total = cross_entropy(student, targets, num_items)
        return LossParts(total, {"ce": total.detach()})


class DivergenceObjective:
    """D(teacher, student) + ce_weight · cross-entropy.

    Args:
        options: the hyper-parameters, checked (`checks.options.checked_options`).
        vocab_size: entries of both vocabularies that are compared.
        tail: of compressed teacher logits, see `distillm_ext.distillation_loss`.
    """

    needs_teacher = True

    def __init__(self, options: DivergenceOptions, *, vocab_size: int | None = None, tail: str = "bucket") -> None:
        self.options, self.vocab_size, self.tail = options, vocab_size, tail

    def __call__(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        targets: Tensor,
        *,
        num_items: int | Tensor,
        ground_truth: bool,
    ) -> LossParts:
        """Computes the loss of one micro-batch.

        Args:
            student: [R, V] logits, differentiable, or the head that makes them.
            teacher: [R, V_teacher] logits, the head that makes them, or what is kept of them.
            targets: [R] int64.
            num_items: the normaliser, global over the optimizer step.
            ground_truth: whether the targets come from the data set or the teacher. A student's own samples are no
                truth to fit, so the cross-entropy is left out for them.

        Returns:
            `LossParts` with "divergence", and "ce" where it has a weight.
        """
        assert teacher is not None  # needs_teacher
        options = self.options if ground_truth else self.options._replace(ce_weight=0.0)
        if isinstance(student, LinearHead):
            return self._fused(student, teacher, targets.to(student.hidden.device), num_items, options)
        teacher = (head_logits(teacher) if isinstance(teacher, LinearHead) else teacher).to(student.device)
        targets, ce = targets.to(student.device), None
        total, metrics = logits_loss(student, teacher, options, self._request(teacher, targets, num_items))
        if options.ce_weight != 0:
            with torch.no_grad():
                ce = cross_entropy(student[:, : self.vocab_size], targets, num_items)
        return _divergence_parts(total, metrics, num_items, ce, options.ce_weight)

    def _fused(
        self,
        student: LinearHead,
        teacher: TeacherOutput,
        targets: Tensor,
        num_items: int | Tensor,
        options: DivergenceOptions,
    ) -> LossParts:
        if not isinstance(teacher, LinearHead):
            teacher = teacher.to(student.hidden.device)
        with_ce = options.ce_weight != 0
        request = self._request(teacher, targets, num_items)
        total, ce, metrics = linear_loss(student, teacher, options, request, need_ce=with_ce)
        return _divergence_parts(total, metrics, num_items, ce if with_ce else None, options.ce_weight)

    def _request(self, teacher: TeacherOutput, targets: Tensor, num_items: int | Tensor) -> LossRequest:
        return LossRequest(
            targets, num_items=num_items, vocab_size=self.vocab_size, tail=self.tail,
            return_metrics=not isinstance(teacher, CompressedLogits),
        )  # fmt: skip


def _divergence_parts(
    total: Tensor, metrics: DivergenceMetrics | None, num_items: int | Tensor, ce: Tensor | None, ce_weight: float
) -> LossParts:
    """The parts of a divergence with or without cross-entropy; metrics as sums over the targets / num_items.

    Compressed teacher logits have no metrics: they do not tell the teacher's entropy.
    """
    parts = {} if metrics is None else {name: getattr(metrics, name).sum() / num_items for name in METRICS}
    if ce is None:
        return LossParts(total, {"divergence": total.detach(), **parts})
    return LossParts(total, {"divergence": total.detach() - ce_weight * ce, "ce": ce, **parts})


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
