"""Validation: cross-entropy on the ground truth and divergence from the teacher, weighted by token over the whole set.

Averaging per-batch means would weight a short batch like a long one, and Accelerate repeats rows to fill the last
batch: both change the loss that φ depends on. So every row reports sums, and repeated rows are dropped before adding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from distillm_ext.containers import LinearHead
from distillm_ext.functional import distillation_loss
from distillm_ext.linear import linear_cross_entropy_loss, linear_distillation_parts
from distillm_ext.training.heads import Rows, Targets, TokenBatch, head_logits
from distillm_ext.training.student import StudentForward
from distillm_ext.training.teaching import DenseTeaching


def token_losses(
    student: Rows, teacher: Targets, targets: Tensor, vocab_size: int | None, tail: str = "bucket"
) -> tuple[Tensor, Tensor]:
    """[R] student's cross-entropy over its whole vocabulary, [R] KL(teacher ‖ student) over `vocab_size` entries.

    Of compressed teacher logits the divergence is the one that `tail` names; with a bucket it is a lower bound.
    """
    if not isinstance(student, LinearHead):
        teacher = (head_logits(teacher) if isinstance(teacher, LinearHead) else teacher).to(student.device)
        divergence = distillation_loss(
            student, teacher, targets, divergence="forward_kl", reduction="none", vocab_size=vocab_size,
            tail=tail,
        )  # fmt: skip
        return functional.cross_entropy(student.float(), targets, reduction="none"), divergence
    if not isinstance(teacher, LinearHead):
        teacher = teacher.to(student.hidden.device)
    whole = vocab_size in (None, student.weight.shape[0])
    divergence, ce, _ = linear_distillation_parts(
        student, teacher, targets, divergence="forward_kl", reduction="none", vocab_size=vocab_size, need_ce=whole,
        tail=tail,
    )  # fmt: skip
    return ce if whole else linear_cross_entropy_loss(student, targets, reduction="none"), divergence


def row_sums(
    student: Rows,
    teacher: Targets,
    targets: Tensor,
    rows: Tensor,
    num_rows: int,
    vocab_size: int | None,
    tail: str = "bucket",
) -> Tensor:
    """Sums per row over its targets.

    Args:
        student: [R, V] logits, or the head that makes them.
        teacher: [R, V_teacher] logits, the head that makes them, or what is kept of them.
        targets: [R] int64.
        rows: [R] int64, the batch row each target belongs to.
        num_rows: B.
        vocab_size: entries of both vocabularies that the divergence compares.
        tail: of compressed teacher logits.

    Returns:
        [B, 3] float32: cross-entropy of the student, KL(teacher ‖ student), number of targets.
    """
    ce, divergence = token_losses(student, teacher, targets, vocab_size, tail)
    values = torch.stack([ce, divergence.to(ce), torch.ones_like(ce)], dim=1)
    return torch.zeros(num_rows, 3, dtype=ce.dtype, device=ce.device).index_add_(0, rows, values)


@dataclass
class ValidationTotals:
    """Totals over the rows seen so far."""

    sums: Tensor | None = None
    rows: int = 0

    def add(self, per_row: Tensor) -> None:
        """Adds the [B, 3] sums of one batch."""
        totals = per_row.double().sum(dim=0)
        self.sums = totals if self.sums is None else self.sums + totals
        self.rows += len(per_row)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Token-weighted means, named `prefix_loss` (nats per token) and `prefix_divergence`.

        Raises:
            ValueError: no target was seen, so there is nothing to average.
        """
        ce, divergence, count = self.sums.tolist() if self.sums is not None else (0.0, 0.0, 0.0)
        if count == 0:
            raise ValueError("eval_dataset: holds no response token; check its loss_mask and max_length")
        return {f"{prefix}_loss": ce / count, f"{prefix}_divergence": divergence / count, f"{prefix}_tokens": count}


class TokenWeightedEvaluation(Trainer):
    """A trainer whose evaluation reports cross-entropy and divergence by token; no predictions are kept.

    The class it is mixed into has `teaching`, `vocab_size`, `tail`, and `student`, a `StudentForward`.
    """

    student: StudentForward
    teaching: DenseTeaching
    vocab_size: int
    tail: str

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Cross-entropy and divergence over the whole set; no predictions are kept."""
        model: Any = self.model
        if not self.accelerator._models:  # evaluation before any training
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        totals = ValidationTotals()
        for inputs in dataloader:
            with torch.no_grad():
                per_row = self._validate(model, self._prepare_inputs(inputs))
            # gather_for_metrics drops the rows that Accelerate repeated to fill the last batch.
            totals.add(self.accelerator.gather_for_metrics(per_row))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = totals.metrics(metric_key_prefix)
        nothing: Any = None
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=metrics, num_samples=totals.rows)

    def _validate(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        batch = TokenBatch.from_inputs(inputs)
        num_rows, length = inputs["input_ids"].shape
        teacher = self.teaching.evaluation_targets(inputs)

        def consume(students: list[Rows]) -> Tensor:
            rows = batch.positions // length
            return row_sums(students[0], teacher, inputs["targets"], rows, num_rows, self.vocab_size, self.tail)

        return self.student(model, [batch], consume, fused=True)
