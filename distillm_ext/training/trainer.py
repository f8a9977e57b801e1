"""`DistillationTrainer`: transformers' training loop around three independent choices: loss, data policy, teacher.

One optimizer step:
1. `get_batch_samples`: the policy decides where the sequences come from (the same on every rank), `Rollouts` generates
   or replays them, and the targets of the whole step are counted over all ranks.
2. `compute_loss`, per micro-batch: the teacher's hidden states at the target positions, then the student's, with the
   loss computed inside the student's head and fused with both heads, so that logits exist for a chunk of positions only
   (where a head is not a plain linear one, all of its logits at once, and a log line says so). loss = sum / count ×
   processes, so any split of a step gives the same gradient.
3. At each validation the policy sees the validation loss.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.draws import Stream, uniform
from distillm_ext.generation import Engine
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.logit_reader import StudentOutput, TokenBatch
from distillm_ext.models.router_loss import ModelLoss, mean_term
from distillm_ext.models.student_forward import StudentForward
from distillm_ext.models.vocabulary import compared_vocabulary, padding_id
from distillm_ext.training import setup
from distillm_ext.training.argument_checks import check_arguments
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.nan_policy import StepRecord
from distillm_ext.training.objectives import LossParts, cross_entropy
from distillm_ext.training.rollouts.policies import Decision, Source, StepContext
from distillm_ext.training.run import RunState
from distillm_ext.training.special_tokens import KeepPadding
from distillm_ext.training.teaching import build as teaching_setup
from distillm_ext.training.validation import TokenWeightedEvaluation

logger = logging.getLogger(__name__)
# Sequences that a later step meets again; replayed ones are kept with the buffer.
_COMES_AGAIN = (Source.DATA, Source.TEACHER)
_COLUMNS = ["input_ids", "loss_mask", "prompt_length", "row"]


class DistillationTrainer(TokenWeightedEvaluation, RunState):
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

    Logged with every loss: `loss`, `loss_divergence`, `loss_ce`, `loss_lm`, `loss_router` (means per optimizer step;
    the balance of the student's experts, without its coefficient), `nan_steps` (optimizer steps left out so far,
    nan_policy "skip"), `phi`,
    `batches_data` / `batches_fresh` / `batches_replay` (optimizer steps by source since the last log), `replay_size`
    (all processes), `tokens_per_second` (all processes), `time_generation` / `time_teacher` / `time_student` /
    `time_loss` / `time_other` (shares of the time, evaluation and checkpoints left out; where the loss is fused with
    the heads, their products count as loss). `state.log_history` also has `batch_source`, the source of the last step.
    With compressed teacher logits also `teacher_rows` and `reused_rows` (rows whose teacher output was computed, and
    taken from store or cache, since the last log) and `reuse_disk_mib` (MiB of kept teacher logits, all processes).
    Evaluation reports `eval_loss` (next-token cross-entropy on the ground truth, nats per token) and `eval_divergence`
    (KL(teacher ‖ student)), both weighted by token.

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

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | teaching_setup.CacheLike | None,
        args: DistillationConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        teacher_cache: teaching_setup.CacheLike | None = None,
        lm_dataset: Dataset | None = None,
        generation_engine: Engine | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        teacher, teacher_cache = teaching_setup.split_teacher(teacher, teacher_cache)
        tokenizer = check_arguments(
            model, teacher, args, processing_class, generation_engine, callbacks,
            {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "lm_dataset": lm_dataset},
        )  # fmt: skip
        setup.check_processes(args)
        models: dict[str, Any] = {"student": model, "teacher": teacher}
        setup.check_lengths(args, models, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        super().__init__(
            model=model,
            args=args,
            data_collator=DistillationCollator(padding_id(tokenizer, model, teacher)),
            train_dataset=setup.prepare_train(train_dataset, tokenizer, args),
            eval_dataset=setup.prepare_eval(eval_dataset, tokenizer, args),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.teacher = None if teacher is None else ModelTeacher(teacher, device=args.device, dtype=args.teacher_dtype)
        self.teacher_cache = teaching_setup.open_cache(teacher_cache, model=self.teacher, tokenizer=tokenizer)
        self.student = StudentForward(self.accelerator.unwrap_model(self.model), self.accelerator.autocast)
        captured = None if self.teacher_cache is None else self.teacher_cache.spec.compression.vocab_size
        self.vocab_size = compared_vocabulary(tokenizer, student=self.student.model, teacher=teacher, cache=captured)
        self.check_rows({"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset})
        dataset: Any = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        with self.accelerator.autocast():
            setup.verify_heads(dataset, self.teacher, self.student)
        self.eos_token_ids = setup.response_ends(args, tokenizer, models, self.train_dataset)
        self.compression = teaching_setup.compression(args, self.teacher_cache, self.vocab_size)
        if self.teacher is None and self.teacher_cache is not None:
            teaching_setup.check_cache_alone(args, self.teacher_cache, self.train_dataset, self.eval_dataset)
        self.tail = teaching_setup.compressed_tail(args, self.compression)
        self.objectives = setup.make_objectives(args, self.vocab_size, self.tail)
        blocks = setup.load_plain_text(args, lm_dataset, tokenizer, self.student.model)
        self.generation_engine = generation_engine
        self.plain_text = setup.make_plain_text(args, blocks, self.data_collator)
        self.add_callback(KeepPadding(model))
        self.watch_for_nan()
        self.reset_extra_state()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = _COLUMNS

    # ---- one optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of one optimizer step, from the source the policy chose, and their targets on all ranks."""
        self._meters.begin()
        self.teaching.settle()
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        step = self.state.global_step
        decision = self._decide(step, sum(len(batch["row"]) for batch in batches))
        with self._meters.clock.section("generation"):
            # state.epoch is a float that rounding may have left just below the next epoch.
            batches = self.rollouts.realise(decision, batches, step=step, epoch=int(self.state.epoch + 1e-6))
        self.teaching.begin_step(decision.source.value, batches, reusable=decision.source in _COMES_AGAIN)
        if decision.store:
            with self._meters.clock.section("teacher"):
                self.teaching.adopt(self.rollouts.buffer.sequences())
        texts = self.plain_text.step(step, len(batches)) if self.plain_text is not None else []
        targets = [sum(len(batch["targets"]) for batch in part) for part in (batches, texts)]
        counts = torch.tensor(targets, device=device)
        counts = self.accelerator.reduce(counts, reduction="sum").clamp(min=1)
        self._meters.start_step(decision.source.value, sum(batch["num_tokens"] for batch in (*batches, *texts)))
        self.nan_guard.begin_step(StepRecord(step + 1, decision.source.value, batches))
        for batch in batches:
            batch["micro_batches"] = len(batches)
        for batch, text in zip(batches, texts, strict=False):
            batch |= {"plain_text": text, "plain_text_items": counts[1]}
        return batches, counts[0]

    def _decide(self, step: int, batch_size: int) -> Decision:
        if self.objectives.warming_up(step):
            return Decision(Source.DATA)
        before, buffer = self.objectives.steps_before_main, self.rollouts.buffer
        context = StepContext(
            step=step - before,
            total_steps=self.state.max_steps - before,
            draw=uniform(self.args.seed, Stream.SOURCE, step),
            batch_size=batch_size,
            buffer_size=len(buffer),
            buffer_capacity=buffer.capacity,
        )
        return self.policy.decide(context)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in the parent, timed as the student's share (the teacher's and the loss's are taken off it)."""
        with self._meters.clock.section("student"):
            loss = super().training_step(model, inputs, num_items_in_batch)
            return self.nan_guard.add_micro_batch(loss, model)

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
        step, clock = self.state.global_step, self._meters.clock
        objective = self.objectives.at(step)
        text = inputs.get("plain_text")
        batches = [TokenBatch.from_inputs(part) for part in (inputs, text) if part is not None]
        count = num_items_in_batch if num_items_in_batch is not None else max(len(inputs["targets"]), 1)
        with clock.section("teacher") if objective.needs_teacher else contextlib.nullcontext():
            teacher = self.teaching.targets(inputs) if objective.needs_teacher else None
        found, own = LossParts(torch.zeros(())), list[ModelLoss]()

        def consume(rows: list[StudentOutput]) -> Tensor:
            nonlocal found
            with clock.section("loss"):
                truth = inputs.get("ground_truth", True)
                found = objective(rows[0], teacher, inputs["targets"], num_items=count, ground_truth=truth)
                if text is not None:
                    found = self._with_plain_text(found, rows[1], text["targets"], inputs["plain_text_items"])
                if own:
                    found = found.plus(mean_term(own, inputs.get("micro_batches", 1), self.accelerator.num_processes))
                # DDP and FSDP average gradients over processes, and the count is over all of them.
                return found.total * self.accelerator.num_processes

        loss = self.student(model, batches, consume, fused=True, model_losses=own)
        parts = {name: part * self.accelerator.num_processes for name, part in found.parts.items()}
        self._meters.add_losses(step, {**parts, "total": found.total.detach() * self.accelerator.num_processes})
        return (loss, parts) if return_outputs else loss

    def _with_plain_text(self, loss: LossParts, rows: StudentOutput, targets: Tensor, count: Tensor) -> LossParts:
        lm = cross_entropy(rows, targets, count)
        return LossParts(loss.total + self.args.lm_weight * lm, {**loss.parts, "lm": lm.detach()})

    # ---- validation and logs

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        step = self.state.global_step
        self.nan_guard.settle()
        if skip_scheduler and step > 0:
            return {}  # the evaluation on start belongs to step 0: a resumed run has had it
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if "eval_loss" in metrics:
            # The validation at the end of a warm-up is the reference that the method starts from.
            before = self.objectives.steps_before_main
            self.policy.observe(metrics["eval_loss"], begun=before == 0 or step > before)
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the parent; its time is left out of the training's shares."""
        with self._meters.clock.section("excluded"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._meters.clock.section("excluded"):
            self.check_weights()
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss parts, φ, sources, sizes, speed and time shares to every log of the training loss."""
        if "loss" not in logs or not self.is_in_train:
            held = setup.sum_over_processes(self.accelerator, self.teaching.sizes()) if "train_runtime" in logs else {}
            return super().log({**logs, **held}, start_time)
        self.nan_guard.settle()
        report = self._meters.report(
            lambda values: self.accelerator.gather(values.unsqueeze(0)), len(self.rollouts.buffer)
        )
        report |= setup.sum_over_processes(self.accelerator, {**self.teaching.counters(), **self.teaching.sizes()})
        if self.args.nan_policy == "skip":
            report["nan_steps"] = self.nan_guard.skipped
        # Where no step since the last log was taken there is no loss to report.
        logs = {name: value for name, value in logs.items() if name != "loss" or name in report}
        super().log({**logs, **report, **self.policy.metrics()}, start_time)
        # Text is for the history alone: TensorBoard takes numbers only.
        newest: dict[str, Any] = self.state.log_history[-1]
        newest["batch_source"] = self._meters.last_source
