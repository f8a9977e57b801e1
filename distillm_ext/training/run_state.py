"""What a distillation run carries from step to step, and how it comes out of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distillm_ext.generation import Engine
from distillm_ext.teacher import TeacherCache
from distillm_ext.teacher.settings import CompressionSettings
from distillm_ext.training import setup, teaching_setup
from distillm_ext.training.collators import DistillationCollator
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.meters import Meters
from distillm_ext.training.policies import make_policy
from distillm_ext.training.resumable import ResumableTrainer
from distillm_ext.training.schedule import SCHEDULES
from distillm_ext.training.teacher import ModelTeacher

logger = logging.getLogger(__name__)


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

    def extra_state(self) -> dict[str, Any]:
        """φ and its reference loss; the epoch of stored responses, and what ended them."""
        return {
            "policy": self.args.policy,
            "policy_state": self.policy.state_dict(),
            "store_epoch": self.rollouts.store.epoch,
            "teaching": self.teaching.state(),
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
