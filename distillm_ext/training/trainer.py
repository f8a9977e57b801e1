"""`DistillationTrainer`: transformers' training loop around three independent choices: loss, data policy, teacher.

One optimizer step:
1. `get_batch_samples`: the policy decides where the sequences come from (the same on every rank), the rollouts generate
   or replay them, and the targets of the whole step are counted over all ranks: `Run.step_batches`.
2. `compute_loss`, per micro-batch: the teacher's hidden states at the target positions, then the student's, with the
   loss computed inside the student's head and fused with both heads: `micro_batch_loss`. loss = sum / count ×
   processes, so any split of a step gives the same gradient.
3. At each validation the policy sees the validation loss: `Run.observe`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.rows.origin import keep_origin
from distillm_ext.generation import Engine
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.vocabulary import padding_id
from distillm_ext.training.argument_checks import check_arguments, check_nan_policy
from distillm_ext.training.checkpoints.resumable import ResumableTrainer
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.faults.nan_evidence import NanReport
from distillm_ext.training.faults.nonfinite import check_weights
from distillm_ext.training.loss import micro_batch_loss
from distillm_ext.training.meters import sum_over_processes
from distillm_ext.training.rollouts.rollouts import Rollouts
from distillm_ext.training.run import Run
from distillm_ext.training.special_tokens import KeepPadding
from distillm_ext.training.splits import check_lengths, prepare_eval, prepare_split, prepare_train
from distillm_ext.training.teaching.build import CacheLike, split_teacher
from distillm_ext.training.validation import evaluate_by_token, evaluation_model, whole_set

logger = logging.getLogger(__name__)


class DistillationTrainer(ResumableTrainer):
    """Trains a student to follow a teacher.

    Args:
        model: the student, a causal LM of transformers (or a PEFT model around one).
        teacher: a causal LM of transformers. It is frozen and put into evaluation mode in place. Or a cache of its
            output (`distillm capture`), as a path or a `TeacherCache`: then no teacher is loaded, and the policy must
            be "dataset".
        args: a `DistillationConfig`.
        train_dataset: rows with `prompt`/`completion` or `messages`, or token rows of `prepare_dataset`. Rows of a
            prompt alone are enough where every step of the policy writes its responses ("on_policy",
            "batched_on_policy", "teacher_responses", "mixed" with `mixed_fraction` 1; no warm-up on the data).
        eval_dataset: the same, with responses; needed by the policy "adaptive_off_policy".
        processing_class: the tokenizer, shared by student and teacher; of a processor its tokenizer is taken.
        teacher_cache: a cache beside a teacher model: rows that it holds meet no teacher, all others the model.
        lm_dataset: plain text (`text` or `input_ids`) for the additional language-modelling loss, in place of the file
            that `args.lm_dataset` names.
        generation_engine: generates the student's responses; None is the decode loop of `distillm_ext.generation` on
            the student itself. An engine with a copy of the weights gets the newest before each generation.
        callbacks, optimizers: as in `transformers.Trainer`.

    Logged with every loss: what `distillm_ext.training.meters` lists. Evaluation reports `eval_loss` (next-token
    cross-entropy on the ground truth, nats per token) and `eval_divergence` (KL(teacher ‖ student)), both weighted by
    token.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or does not fit the configuration.
        RuntimeError: the launcher's processes are not the ones that train.

    Example:
        >>> trainer = DistillationTrainer(student, teacher, DistillationConfig(output_dir="out"), train_dataset=rows,
        ...                               processing_class=tokenizer)
        >>> trainer.train()
    """

    # compute_loss divides by the targets of the whole optimizer step: no further division by accumulation steps.
    loss_is_scaled_for_ga = True
    args: DistillationConfig
    data_collator: DistillationCollator
    run: Run
    _not_finite: str | None = None  # of the newest evaluation, see `nonfinite_rows`

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | CacheLike | None,
        args: DistillationConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_cache: CacheLike | None = None,
        lm_dataset: Dataset | None = None,
        generation_engine: Engine | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        teacher, teacher_cache = split_teacher(teacher, teacher_cache)
        given = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        tokenizer = check_arguments(
            model, teacher, args, processing_class, generation_engine, callbacks, {**given, "lm_dataset": lm_dataset}
        )
        check_lengths(args, {"student": model, "teacher": teacher}, given)
        super().__init__(
            model=model,
            args=args,
            data_collator=DistillationCollator(padding_id(tokenizer, model, teacher)),
            train_dataset=prepare_train(train_dataset, tokenizer, args),
            eval_dataset=prepare_eval(eval_dataset, tokenizer, args),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_nan_policy(args, self.optimizer, deepspeed=self.is_deepspeed_enabled)
        self.run = Run(
            args,
            self.accelerator,
            student=lambda: self.accelerator.unwrap_model(self.model_wrapped),
            teacher=teacher,
            cache=teacher_cache,
            tokenizer=tokenizer,
            collator=self.data_collator,
            splits={"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset},
            lm_dataset=lm_dataset,
            engine=generation_engine,
            nan_report=NanReport(self),
        )
        self.add_callback(KeepPadding(model))
        self.add_callback(self.run.nan_guard)

    @property
    def teacher(self) -> ModelTeacher | None:
        """The frozen teacher; None where there is a cache alone."""
        return self.run.teacher

    @property
    def vocab_size(self) -> int:
        """Entries of both vocabularies that the losses compare."""
        return self.run.vocab_size

    @property
    def rollouts(self) -> Rollouts:
        """Replay buffer and sources of responses."""
        return self.run.rollouts

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["input_ids", "loss_mask", "prompt_length", "row"]

    # ---- one optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, from the source the policy chose, and their targets on all ranks."""
        self.run.meters.begin()
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            self.run.teaching.settle()
            return [], None
        state, epoch = self.state, int(self.state.epoch + 1e-6)  # which rounding may have left just below the next
        return self.run.step_batches(batches, step=state.global_step, total_steps=state.max_steps, epoch=epoch)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in the parent, timed as the student's share (the teacher's and the loss's are taken off it)."""
        with self.run.meters.clock.section("student"):
            loss = super().training_step(model, inputs, num_items_in_batch)
            return self.run.nan_guard.add_micro_batch(loss, model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch of the current step: sum over its targets / targets of the step × processes.

        Args:
            model: the student as wrapped for training.
            inputs: a micro-batch of `get_batch_samples`, or of the collator.
            return_outputs: also return the detached loss parts.
            num_items_in_batch: targets of the step on all ranks; None takes those of this micro-batch.
        """
        count = max(len(inputs["targets"]), 1) if num_items_in_batch is None else num_items_in_batch
        loss, parts = micro_batch_loss(self.run, model, inputs, count, step=self.state.global_step)
        return (loss, parts) if return_outputs else loss

    # ---- steps of NaN or inf

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the parent; a run that ends with weights of NaN or inf is an error."""
        result = super().train(*args, **kwargs)
        self._check_weights()
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As in the parent, which calls it after clipping and before the optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # there the step has been taken
            self.run.nan_guard.add_grad_norm(norm)
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.run.meters.clock.section("excluded"):
            self._check_weights()
            super()._save_checkpoint(model, trial)

    def _check_weights(self) -> None:
        self.run.nan_guard.settle()
        check_weights(self.model_wrapped, self.accelerator, self.state.global_step)

    # ---- validation and logs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in the parent, over the whole set: `dataloader_drop_last` and `even_batches` concern training.

        Args:
            eval_dataset: None or a name is the trainer's own set. Another one may hold rows as `eval_dataset` of the
                trainer does: they are tokenised and numbered here.
        """
        # The parent hands over the trainer's own set, which has been prepared.
        own = eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset
        with whole_set(self.args, self.accelerator, keep_workers=own):
            return super().get_eval_dataloader(eval_dataset if own else self._prepared(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        with whole_set(self.args, self.accelerator, keep_workers=False):
            return super().get_test_dataloader(self._prepared(test_dataset, "test_dataset"))

    def _prepared(self, dataset: Any, name: str) -> Any:
        self.run.check_rows({name: (rows := prepare_split(dataset, self.processing_class, self.args, name))})
        return rows

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return keep_origin(super()._remove_unused_columns(dataset, description), dataset)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """See `evaluate_by_token`. A warning names the rows whose loss or divergence is NaN or inf."""
        model = evaluation_model(self.model, self.optimizer, self.accelerator)

        def sums_of(inputs: Any) -> tuple[Tensor, Tensor]:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                sums = self.run.validation_sums(model, inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            return inputs["row"], sums

        found = evaluate_by_token(
            dataloader, sums_of, accelerator=self.accelerator, description=description, prefix=metric_key_prefix
        )
        self._not_finite = found.not_finite
        if found.not_finite is not None and self.is_world_process_zero():
            best = "; a checkpoint with such a metric is not taken for the best one" * self.args.load_best_model_at_end
            logger.warning("step %d: %s%s", self.state.global_step, found.not_finite, best)
        return EvalLoopOutput(None, None, metrics=found.metrics, num_samples=found.num_rows)  # type: ignore[arg-type]

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """As in the parent, but once at step 0; what follows from it is `Run.observe`."""
        step = self.state.global_step
        self.run.nan_guard.settle()
        if skip_scheduler and step > 0:
            return {}  # the evaluation on start belongs to step 0: a resumed run has had it
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self.run.observe(metrics, step=step, not_finite=self._not_finite)
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the parent; its time is left out of the training's shares."""
        with self.run.meters.clock.section("excluded"):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss parts, φ, sources, sizes, speed and time shares to every log of the training loss."""
        if "loss" not in logs or not self.is_in_train:
            sizes = self.run.teaching.sizes() if "train_runtime" in logs else {}
            return super().log({**logs, **sum_over_processes(self.accelerator, sizes)}, start_time)
        self.run.nan_guard.settle()
        report = self.run.report()
        # Where no step since the last log was taken there is no loss to report.
        logs = {name: value for name, value in logs.items() if name != "loss" or name in report}
        super().log({**logs, **report}, start_time)
        # Text is for the history alone: TensorBoard takes numbers only.
        newest: dict[str, Any] = self.state.log_history[-1]
        newest["batch_source"] = self.run.meters.last_source
