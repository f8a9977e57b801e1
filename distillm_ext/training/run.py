"""What a distillation run carries from step to step, and how it comes out of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.rows.origin import RowOrigin, origin_of
from distillm_ext.generation import Engine
from distillm_ext.generation.positions import check_positions
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.student_forward import StudentForward
from distillm_ext.teacher import TeacherCache
from distillm_ext.teacher.settings import CompressionSettings
from distillm_ext.training import setup
from distillm_ext.training.argument_checks import check_tokens
from distillm_ext.training.checkpoints.resumable import ResumableTrainer
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.meters import Meters
from distillm_ext.training.nan_evidence import NanReport
from distillm_ext.training.nan_policy import NanGuard
from distillm_ext.training.rollouts.policies import make_policy
from distillm_ext.training.rollouts.schedule import SCHEDULES
from distillm_ext.training.teaching import build as teaching_setup

logger = logging.getLogger(__name__)

_IN_BACKWARD = ("lomo", "adalomo", "layerwisedummyoptimizer")


class RunState(ResumableTrainer):
    """Policy, replay buffer, stored responses and kept teacher logits of a run. The attributes are the trainer's."""

    args: DistillationConfig
    data_collator: DistillationCollator
    teacher: ModelTeacher | None
    teacher_cache: TeacherCache | None
    compression: CompressionSettings | None
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    generation_engine: Engine | None
    student: StudentForward
    nan_guard: NanGuard
    row_origin: RowOrigin

    def watch_for_nan(self) -> None:
        """Sets up what happens to optimizer steps of NaN or inf.

        Raises:
            ValueError: the policy cannot be kept with DeepSpeed, or with an optimizer that steps in the backward pass.
        """
        if self.args.nan_policy == "skip" and self.is_deepspeed_enabled:
            raise ValueError(
                "nan_policy: 'skip' is not supported with DeepSpeed, whose engine takes the optimizer step inside the "
                "backward pass; set nan_policy='stop'"
            )
        optim = getattr(self.args.optim, "value", self.args.optim)
        if self.args.nan_policy == "skip" and steps_in_backward(optim, self.optimizer):
            raise ValueError(
                f"nan_policy: 'skip' is not supported with optim={optim!r}, or an optimizer handed over, that takes "
                "its steps inside the backward pass; set nan_policy='stop', or an optimizer that is not layerwise"
            )
        self.nan_report = NanReport(self)
        # Not by `setup.prepare_train`, in which the processes wait for each other: not every process looks for a row.
        self.row_origin = origin_of(self.train_dataset)
        self.nan_guard = NanGuard(
            self.accelerator, report=self.nan_report, drop_losses=lambda flag: self._meters.end_step(flag)
        )
        self.add_callback(self.nan_guard)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the parent; a run that ends with weights of NaN or inf is an error."""
        result = super().train(*args, **kwargs)
        self.check_weights()
        return result

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As in the parent, which calls it after clipping and before the optimizer step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # there the step has been taken
            self.nan_guard.add_grad_norm(norm)
        return norm

    def check_weights(self) -> None:
        """Every process; before anything is saved.

        Raises:
            FloatingPointError: the last optimizer step was not sound and the policy is to stop, or weights of the
                student are NaN or inf.
        """
        self.nan_guard.settle()
        names, broken = self.nan_report.nonfinite_weights()
        if broken:
            named = f"{names[0]}, {len(names)} in all" if names else "on another process"
            raise FloatingPointError(
                f"step {self.state.global_step}: weights of the student are NaN or inf ({named}); nothing is saved. Go "
                "on from an earlier checkpoint, with a smaller learning_rate"
            )

    def reset_extra_state(self) -> None:
        """A fresh policy, an empty buffer, no stored responses, nothing counted."""
        args = self.args
        schedule = SCHEDULES[args.schedule](args.sgo_initial, args.sgo_increment, args.sgo_threshold, args.replay_ratio)
        self.policy = make_policy(args.policy, mixed_fraction=args.mixed_fraction, schedule=schedule)
        self.rollouts = setup.make_rollouts(
            args,
            collator=self.data_collator,
            student=lambda: self.accelerator.unwrap_model(self.model_wrapped),
            teacher=self.teacher.model if self.teacher is not None else None,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            autocast=self.accelerator.autocast,
            train_dataset=self.train_dataset,
            engine=self.generation_engine,
        )
        self.teaching = teaching_setup.make_teaching(
            args,
            self.compression,
            model=self.teacher,
            cache=self.teacher_cache,
            collator=self.data_collator,
            train_dataset=self.train_dataset,
        )
        self._meters = Meters(args.device)
        self.nan_guard.reset()

    def check_rows(self, splits: Mapping[str, Any]) -> None:
        """Refuses prepared rows that a model of the run cannot read, or whose targets the losses cannot compare.

        Raises:
            ValueError: names the data set, the row, and the token and model or the limit.
        """
        models = {"student": self.student.model, "teacher": self.teacher.model if self.teacher is not None else None}
        check_positions(models, self.args.max_length, rows=splits)
        check_tokens(splits, self.processing_class, models, self.vocab_size)

    def extra_state(self) -> dict[str, Any]:
        """φ and its reference loss; the epoch of stored responses, and what ended them."""
        return {
            "policy": self.args.policy,
            "policy_state": self.policy.state_dict(),
            "store_epoch": self.rollouts.store.epoch,
            "teaching": self.teaching.state(),
            "nan_steps": self.nan_guard.skipped,
            "eos_token_ids": list(self.eos_token_ids),
        }

    def extra_tensors(self) -> dict[str, Tensor]:
        """Replay buffer, stored responses and kept teacher logits of this process."""
        self.teaching.settle()
        return {**self.rollouts.pack(), **self.teaching.pack()}

    def load_extra_state(self, state: Mapping[str, Any], tensors: list[dict[str, Tensor]]) -> None:
        """Restores all of it. A run that goes on under another policy starts that policy anew."""
        if state["policy"] != self.args.policy:
            logger.warning("checkpoint of policy %r: %r starts anew", state["policy"], self.args.policy)
        else:
            self.policy.load_state_dict(state["policy_state"])
            self._load_responses(state, tensors)
        replayed = [sequence.key for sequence in self.rollouts.buffer.sequences()]
        self.teaching.unpack(state.get("teaching", {}), tensors, replayed)
        self.nan_guard.skipped = int(state.get("nan_steps", 0))

    def _load_responses(self, state: Mapping[str, Any], tensors: list[dict[str, Tensor]]) -> None:
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


def steps_in_backward(name: Any, optimizer: Any) -> bool:
    """Whether an optimizer, by its name in transformers' `optim` or as it is, takes its steps inside the backward pass:
    LOMO and the layerwise ones."""
    if optimizer is not None:
        inner = getattr(optimizer, "optimizer", optimizer)
        return any(cls.__name__.lower() in _IN_BACKWARD for cls in type(inner).__mro__)
    text = str(name).lower()
    return text.endswith("layerwise") or text in _IN_BACKWARD
