"""Validation: cross-entropy on the ground truth and divergence from the teacher, weighted by token over the whole set.

Averaging per-batch means would weight a short batch like a long one, and loaders repeat rows to fill batches or leave
the last ones out: all of it changes the loss that φ depends on. So every row reports sums under its number, each row
counts once, and a set of which rows are missing is an error.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from distillm_ext.containers import LinearHead
from distillm_ext.data.rows.origin import keep_origin, name_row, origin_of
from distillm_ext.functional import distillation_loss
from distillm_ext.linear import linear_cross_entropy_loss, linear_distillation_parts
from distillm_ext.models.logit_reader import StudentOutput, Targets, TokenBatch, head_logits
from distillm_ext.models.student_forward import StudentForward
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.setup import prepare_split
from distillm_ext.training.teaching.sources import LiveTargets

logger = logging.getLogger(__name__)


def token_losses(
    student: StudentOutput, teacher: Targets, targets: Tensor, vocab_size: int | None, tail: str = "bucket"
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
    student: StudentOutput,
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


class RowTotals:
    """Sums per row, by the row's number, from batches of any size and order on any number of processes."""

    def __init__(self, device: torch.device) -> None:
        self._rows = [torch.empty(0, dtype=torch.int64, device=device)]
        self._sums = [torch.empty(0, 3, dtype=torch.float64, device=device)]

    def add(self, rows: Tensor, sums: Tensor) -> None:
        """Adds the [B, 3] sums of one batch; `rows` [B] are the numbers of its rows."""
        self._rows.append(rows)
        self._sums.append(sums.double())

    def collect(self, accelerator: Any) -> tuple[np.ndarray, np.ndarray]:
        """→ (numbers [n], rising; sums [n, 3] float64) of the rows of all processes, each row once.

        Every process calls it. A sum over the result does not depend on how the rows were dealt out.
        """
        rows, sums = torch.cat(self._rows), torch.cat(self._sums)
        if accelerator.num_processes > 1:
            rows = accelerator.gather(accelerator.pad_across_processes(rows, dim=0, pad_index=-1))
            sums = accelerator.gather(accelerator.pad_across_processes(sums, dim=0))
        numbers, first = np.unique(rows.cpu().numpy(), return_index=True)
        real = numbers >= 0
        return numbers[real], sums.cpu().numpy()[first[real]]


def token_means(sums: np.ndarray, prefix: str) -> dict[str, float]:
    """Token-weighted means of [n, 3] row sums: `prefix_loss` (nats per token), `prefix_divergence`, `prefix_tokens`.

    Raises:
        ValueError: no target was seen, so there is nothing to average.
    """
    ce, divergence, count = sums.sum(axis=0).tolist() if len(sums) else (0.0, 0.0, 0.0)
    if count == 0:
        raise ValueError("eval_dataset: holds no response token; check its loss_mask and max_length")
    return {f"{prefix}_loss": ce / count, f"{prefix}_divergence": divergence / count, f"{prefix}_tokens": count}


def nonfinite_rows(rows: np.ndarray, sums: np.ndarray, dataset: Any, prefix: str) -> str | None:
    """The rows of an evaluation whose sums are NaN or inf, in a sentence; None where all are finite.

    Args:
        rows: [n] numbers of the rows.
        sums: [n, 3] of `RowTotals.collect`.
        dataset: the prepared rows, whose file and lines are named where they are known.
        prefix: of the metrics.
    """
    bad = ~np.isfinite(sums[:, :2])
    if not bad.any():
        return None
    found, origin = np.flatnonzero(bad.any(axis=1)), origin_of(dataset)
    named = []
    for place in found[:5]:
        kinds = [kind for kind, flag in zip(("loss", "divergence"), bad[place], strict=True) if flag]
        number = int(rows[place])
        named.append(f"{name_row(number, origin(number))}: {', '.join(kinds)}")
    metrics = [f"{prefix}_{kind}" for kind, flag in zip(("loss", "divergence"), bad.any(axis=0), strict=True) if flag]
    return f"NaN or inf in {' and '.join(metrics)}: {len(found)} of {len(rows)} rows ({'; '.join(named)})"


class TokenWeightedEvaluation(Trainer):
    """A trainer whose evaluation reports cross-entropy and divergence by token; no predictions are kept.

    The class it is mixed into has `teaching`, `vocab_size`, `tail`, `check_rows`, and `student`, a `StudentForward`.
    """

    args: DistillationConfig
    student: StudentForward
    teaching: LiveTargets
    vocab_size: int
    tail: str
    _nonfinite: str | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in the parent, over the whole set: `dataloader_drop_last` and `even_batches` concern training.

        Args:
            eval_dataset: None or a name is the trainer's own set. Another one may hold rows as `eval_dataset` of the
                trainer does: they are tokenised and numbered here.
        """
        # The parent hands over the trainer's own set, which has been prepared.
        own = eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset
        with self._whole_set(keep_workers=own):
            return super().get_eval_dataloader(eval_dataset if own else self._numbered(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        with self._whole_set(keep_workers=False):
            return super().get_test_dataloader(self._numbered(test_dataset, "test_dataset"))

    def _numbered(self, dataset: Any, name: str) -> Dataset:
        rows = prepare_split(dataset, self.processing_class, self.args, name)
        run: Any = self
        run.check_rows({name: rows})
        return rows

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return keep_origin(super()._remove_unused_columns(dataset, description), dataset)

    @contextlib.contextmanager
    def _whole_set(self, *, keep_workers: bool) -> Iterator[None]:
        """Options under which a loader leaves no row out.

        Without `even_batches` a process may have no last batch, and the others would wait for it in the forward pass.
        The parent keeps a loader of persistent workers under one name for every set that it is handed: a set that is
        none of the trainer's own must not get the loader of another.
        """
        args, accelerator = self.args, self.accelerator
        before = args.dataloader_drop_last, args.dataloader_persistent_workers, accelerator.even_batches
        args.dataloader_drop_last, accelerator.even_batches = False, True
        args.dataloader_persistent_workers = before[1] and keep_workers
        try:
            yield
        finally:
            args.dataloader_drop_last, args.dataloader_persistent_workers, accelerator.even_batches = before

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Cross-entropy and divergence over the whole set; no predictions are kept. A warning names the rows of which
        they are NaN or inf.

        Raises:
            RuntimeError: the loader left rows out.
        """
        model: Any = self.model
        if not self.accelerator._models:  # evaluation before any training
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "eval", None)):  # some optimizers train with other weights than they give
            optimizer.eval()
        totals = RowTotals(self.args.device)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                totals.add(inputs["row"], self._validate(model, inputs))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        rows, sums = totals.collect(self.accelerator)
        expected = len(dataloader.dataset)
        if len(rows) != expected:
            raise RuntimeError(f"{description}: {len(rows)} of {expected} rows were seen; the loader leaves rows out")
        metrics = token_means(sums, metric_key_prefix)
        self._warn_of(nonfinite_rows(rows, sums, dataloader.dataset, metric_key_prefix))
        nothing: Any = None
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=metrics, num_samples=len(rows))

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """The validation of a run. Every process has the same sums, so all of them raise or none does.

        Raises:
            FloatingPointError: the loss that φ of the policy "adaptive_off_policy" depends on is NaN or inf.
        """
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.args.policy == "adaptive_off_policy" and not np.isfinite(metrics.get("eval_loss", 0.0)):
            raise FloatingPointError(
                f"step {self.state.global_step}: {self._nonfinite}. Policy 'adaptive_off_policy' sets φ by the "
                "validation loss: correct or remove these rows, or, where all rows are at fault, go on from an "
                "earlier checkpoint with a smaller learning_rate"
            )
        return metrics

    def _warn_of(self, found: str | None) -> None:
        self._nonfinite = found
        if found is None or not self.is_world_process_zero():
            return
        best = "; a checkpoint with such a metric is not taken for the best one"
        logger.warning("step %d: %s%s", self.state.global_step, found, best if self.args.load_best_model_at_end else "")

    def _validate(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        batch = TokenBatch.from_inputs(inputs)
        num_rows, length = inputs["input_ids"].shape
        teacher = self.teaching.evaluation_targets(inputs)

        def consume(students: list[StudentOutput]) -> Tensor:
            rows = batch.positions // length
            return row_sums(students[0], teacher, inputs["targets"], rows, num_rows, self.vocab_size, self.tail)

        return self.student(model, [batch], consume, fused=True)
