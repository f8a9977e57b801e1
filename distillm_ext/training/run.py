"""`Run`: what a distillation run is made of, what it carries from step to step, and how that outlives a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.draws import Stream, uniform
from distillm_ext.data.rows.origin import origin_of
from distillm_ext.generation import Engine
from distillm_ext.generation.positions import check_positions
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.logit_reader import StudentOutput, TokenBatch
from distillm_ext.models.student_forward import StudentForward
from distillm_ext.models.vocabulary import compared_vocabulary
from distillm_ext.training import makers
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.faults.nan_policy import Fault, NanGuard, StepRecord
from distillm_ext.training.meters import Meters, sum_over_processes
from distillm_ext.training.rollouts.policies import Decision, Source, StepContext
from distillm_ext.training.splits import check_tokens
from distillm_ext.training.teaching.build import CacheLike, check_cache_alone, open_cache
from distillm_ext.training.validation import row_sums

logger = logging.getLogger(__name__)
# Sequences that a later step meets again; replayed ones are kept with the buffer.
_COMES_AGAIN = (Source.DATA, Source.TEACHER)


class Run:
    """The parts of a run: fixed ones, made with it, and those that `reset` makes and a checkpoint restores.

    Args:
        args: the configuration.
        accelerator: of the trainer.
        student: returns the student without wrappers.
        teacher: the teacher's model, or None where there is a cache alone.
        cache: a cache of the teacher's output, or None.
        tokenizer, collator: of all data sets.
        splits: prepared rows, `train_dataset` and `eval_dataset`, each of which may be None.
        lm_dataset: plain text, or None.
        engine: generates the student's responses; None is the decode loop on the student itself.
        nan_report: called for each optimizer step of NaN or inf, see `NanGuard`.

    Attributes:
        student, teacher: forward passes and heads of the student; the frozen teacher or None.
        cache: the cache, opened, or None.
        vocab_size: entries of both vocabularies that the losses compare.
        eos_token_ids: what ends a response.
        compression: how the teacher's logits are compressed, None where they are used as they are.
        tail: how compressed logits are read.
        objectives: what each step minimises.
        plain_text: batches of the language-modelling term, or None.
        row_origin: finds file and line of a training row.
        nan_guard: keeps steps of NaN or inf from being taken.
        policy, rollouts, teaching, meters: where the sequences of a step come from, what realises it, what the losses
            read of the teacher, and what is reported.
    """

    def __init__(
        self,
        args: DistillationConfig,
        accelerator: Any,
        *,
        student: Callable[[], Any],
        teacher: Any,
        cache: CacheLike | None,
        tokenizer: Any,
        collator: DistillationCollator,
        splits: Mapping[str, Any],
        lm_dataset: Dataset | None,
        engine: Engine | None,
        nan_report: Callable[[Fault], None],
    ) -> None:
        self.args, self.accelerator, self.tokenizer, self.collator = args, accelerator, tokenizer, collator
        self.unwrapped_student, self.engine, self.train_dataset = student, engine, splits["train_dataset"]
        self.teacher = None if teacher is None else ModelTeacher(teacher, device=args.device, dtype=args.teacher_dtype)
        self.cache = open_cache(cache, model=self.teacher, tokenizer=tokenizer)
        self.student = StudentForward(student(), accelerator.autocast)
        captured = None if self.cache is None else self.cache.spec.compression.vocab_size
        self.vocab_size = compared_vocabulary(tokenizer, student=self.student.model, teacher=teacher, cache=captured)
        self.check_rows(splits)
        self._verify_heads(splits)
        self.eos_token_ids = makers.response_ends(args, tokenizer, self.models, self.train_dataset)
        self.compression = makers.make_compression(args, self.cache, self.vocab_size)
        if self.teacher is None and self.cache is not None:
            check_cache_alone(self.cache, splits, policy=args.policy, rank=args.process_index, world=args.world_size)
        self.tail = makers.compressed_tail(args, self.compression)
        self.objectives = makers.make_objectives(args, self.vocab_size, self.tail)
        self.plain_text = makers.make_plain_text(args, lm_dataset, tokenizer, self.student.model, collator)
        # Not where the rows are prepared, for there the processes wait for each other: not every process looks for one.
        self.row_origin = origin_of(self.train_dataset)
        self.nan_guard = NanGuard(accelerator, report=nan_report, drop_losses=lambda flag: self.meters.end_step(flag))
        self.reset()

    @property
    def models(self) -> dict[str, Any]:
        """Student and teacher by these names; the teacher is None where there is a cache alone."""
        return {"student": self.student.model, "teacher": None if self.teacher is None else self.teacher.model}

    def check_rows(self, splits: Mapping[str, Any]) -> None:
        """Refuses prepared rows that a model of the run cannot read, or whose targets the losses cannot compare.

        Raises:
            ValueError: names the data set, the row, and the token and model or the limit.
        """
        check_positions(self.models, self.args.max_length, rows=splits)
        check_tokens(splits, self.tokenizer, self.models, self.vocab_size)

    def _verify_heads(self, splits: Mapping[str, Any]) -> None:
        """Checks on a few tokens of the data that backbones and heads, used apart, give the models' own logits."""
        rows = next((split for split in splits.values() if split is not None), None)
        if not isinstance(rows, Dataset):
            return
        with self.accelerator.autocast():
            if self.teacher is not None:
                self.teacher.verify(rows[0]["input_ids"][:16])
            self.student.verify(rows[0]["input_ids"][:16])

    # ---- what changes from step to step

    def reset(self) -> None:
        """The state before step 0: a fresh policy, an empty buffer, no stored responses, nothing counted."""
        self.policy = makers.make_run_policy(self.args)
        self.rollouts = makers.make_rollouts(
            self.args,
            collator=self.collator,
            student=self.unwrapped_student,
            teacher=self.models["teacher"],
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            autocast=self.accelerator.autocast,
            train_dataset=self.train_dataset,
            engine=self.engine,
        )
        self.teaching = makers.make_teaching(
            self.args,
            self.compression,
            model=self.teacher,
            cache=self.cache,
            collator=self.collator,
            train_dataset=self.train_dataset,
        )
        self.meters = Meters(self.args.device)
        self.nan_guard.reset()

    def step_batches(
        self, batches: list[dict[str, Any]], *, step: int, total_steps: int, epoch: int
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of optimizer step `step` (0-based), from the source that the policy chose.

        Args:
            batches: micro-batches of the data set; as many and as large ones are returned.
            step, total_steps: of the run.
            epoch: 0-based.

        Returns:
            The micro-batches, and the number of their targets over all processes (a tensor).
        """
        self.teaching.settle()
        decision = self._decide(step, total_steps, sum(len(batch["row"]) for batch in batches))
        with self.meters.clock.section("generation"):
            batches = self.rollouts.realise(decision, batches, step=step, epoch=epoch)
        self.teaching.begin_step(decision.source.value, batches, reusable=decision.source in _COMES_AGAIN)
        if decision.store:
            with self.meters.clock.section("teacher"):
                self.teaching.adopt(self.rollouts.buffer.sequences())
        texts = self.plain_text.step(step, len(batches)) if self.plain_text is not None else []
        targets = [sum(len(batch["targets"]) for batch in part) for part in (batches, texts)]
        counts = torch.tensor(targets, device=self.args.device)
        counts = self.accelerator.reduce(counts, reduction="sum").clamp(min=1)
        self.meters.start_step(decision.source.value, sum(batch["num_tokens"] for batch in (*batches, *texts)))
        self.nan_guard.begin_step(StepRecord(step + 1, decision.source.value, batches))
        for batch in batches:
            batch["micro_batches"] = len(batches)
        for batch, text in zip(batches, texts, strict=False):
            batch |= {"plain_text": text, "plain_text_items": counts[1]}
        return batches, counts[0]

    def _decide(self, step: int, total_steps: int, batch_size: int) -> Decision:
        if self.objectives.warming_up(step):
            return Decision(Source.DATA)
        before, buffer = self.objectives.steps_before_main, self.rollouts.buffer
        context = StepContext(
            step=step - before,
            total_steps=total_steps - before,
            draw=uniform(self.args.seed, Stream.SOURCE, step),
            batch_size=batch_size,
            buffer_size=len(buffer),
            buffer_capacity=buffer.capacity,
        )
        return self.policy.decide(context)

    def validation_sums(self, wrapped: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """[B, 3] sums over the targets of each row of a collated batch, see `validation.row_sums`."""
        batch = TokenBatch.from_inputs(inputs)
        num_rows, length = batch.input_ids.shape
        teacher = self.teaching.evaluation_targets(inputs)

        def consume(students: list[StudentOutput]) -> Tensor:
            rows = batch.positions // length
            return row_sums(students[0], teacher, inputs["targets"], rows, num_rows, self.vocab_size, self.tail)

        return self.student(wrapped, [batch], consume, fused=True)

    def observe(self, metrics: Mapping[str, float], *, step: int, not_finite: str | None) -> None:
        """Shows the policy the validation after `step` optimizer steps; `not_finite` says what was NaN or inf in it.

        Every process has the same metrics, so all of them raise or none does.

        Raises:
            FloatingPointError: the loss that φ of the policy "adaptive_off_policy" depends on is NaN or inf.
        """
        loss = metrics.get("eval_loss")
        if loss is None:
            return
        if self.args.policy == "adaptive_off_policy" and not math.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: {not_finite}. Policy 'adaptive_off_policy' sets φ by the validation loss: correct or "
                "remove these rows, or, where all rows are at fault, go on from an earlier checkpoint with a smaller "
                "learning_rate"
            )
        # The validation at the end of a warm-up is the reference that the method starts from.
        before = self.objectives.steps_before_main
        self.policy.observe(loss, begun=before == 0 or step > before)

    def report(self) -> dict[str, float]:
        """What to log of the steps since the last report, over all processes; every process calls it."""
        report = self.meters.report(
            lambda values: self.accelerator.gather(values.unsqueeze(0)), len(self.rollouts.buffer)
        )
        report |= sum_over_processes(self.accelerator, {**self.teaching.counters(), **self.teaching.sizes()})
        if self.args.nan_policy == "skip":
            report["nan_steps"] = self.nan_guard.skipped
        return {**report, **self.policy.metrics()}

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """JSON-serialisable, equal on all processes: φ and its reference loss; the epoch of stored responses, and what
        ended them."""
        return {
            "policy": self.args.policy,
            "policy_state": self.policy.state_dict(),
            "store_epoch": self.rollouts.store.epoch,
            "teaching": self.teaching.state(),
            "nan_steps": self.nan_guard.skipped,
            "eos_token_ids": list(self.eos_token_ids),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Replay buffer, stored responses and kept teacher logits of this process."""
        self.teaching.settle()
        return {**self.rollouts.pack(), **self.teaching.pack()}

    def restore(self, state: Mapping[str, Any], tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Restores `state`, and `tensors` from those of every process that saved. A run that goes on under another
        policy starts that policy anew."""
        if state["policy"] != self.args.policy:
            logger.warning("checkpoint of policy %r: %r starts anew", state["policy"], self.args.policy)
        else:
            self.policy.load_state_dict(state["policy_state"])
            self._restore_responses(state, tensors)
        replayed = [sequence.key for sequence in self.rollouts.buffer.sequences()]
        self.teaching.unpack(state.get("teaching", {}), tensors, replayed)
        self.nan_guard.skipped = int(state.get("nan_steps", 0))

    def _restore_responses(self, state: Mapping[str, Any], tensors: Sequence[Mapping[str, Tensor]]) -> None:
        before = state.get("eos_token_ids")
        if before != list(self.eos_token_ids):
            logger.warning(
                "checkpoint: its responses end at %s, those of this run at %s; replay buffer and stored responses "
                "start anew", "tokens it does not name" if before is None else before, list(self.eos_token_ids),
            )  # fmt: skip
            return
        self.rollouts.unpack(
            tensors, store_epoch=state["store_epoch"], rank=self.args.process_index, world=self.args.world_size
        )
