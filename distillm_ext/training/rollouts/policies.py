"""Data policies: which sequences an optimizer step trains on. They know nothing of losses or of the teacher's model.

| policy                | sequences                                                               | known as    |
|-----------------------|-------------------------------------------------------------------------|-------------|
| `dataset`             | data-set responses                                                      | KD          |
| `teacher_responses`   | the teacher's response to each prompt, made once                        | SeqKD       |
| `on_policy`           | responses of the current student                                        | ImitKD      |
| `mixed`               | on-policy with probability `mixed_fraction`, else the data set          | GKD         |
| `batched_on_policy`   | responses of the student as it was when the epoch began                 | DistiLLM-2  |
| `adaptive_off_policy` | fresh or replayed student responses with probability φ, else the data set | DistiLLM  |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from distillm_ext.training.rollouts.schedule import AdaptiveSchedule

POLICIES = ("dataset", "teacher_responses", "on_policy", "mixed", "adaptive_off_policy", "batched_on_policy")
# Policies whose every step writes its responses.
_WRITING = ("teacher_responses", "on_policy", "batched_on_policy")


class Source(str, Enum):
    """Where the sequences of a step come from, as the logs name it."""

    DATA = "data"
    FRESH = "fresh"
    REPLAY = "replay"
    TEACHER = "teacher"
    EPOCH = "epoch"


@dataclass(frozen=True)
class Decision:
    """What to do in one optimizer step.

    Attributes:
        source: where the sequences come from. A step that generates counts as "fresh" even where the paper's rule then
            draws its batch from the buffer.
        store: put the fresh responses into the replay buffer.
        draw_from_buffer: train on a uniform sample of the buffer.
    """

    source: Source
    store: bool = False
    draw_from_buffer: bool = False


@dataclass(frozen=True)
class StepContext:
    """What a policy may look at. Every field is equal on all ranks, so all ranks decide alike.

    Attributes:
        step: optimizer steps of the method already done, 0-based.
        total_steps: optimizer steps of the method in the whole run.
        draw: u ~ U[0, 1) of this step.
        batch_size: sequences that one process trains on in this step.
        buffer_size, buffer_capacity: sequences in the replay buffer of one process, and most of them.
    """

    step: int
    total_steps: int
    draw: float
    batch_size: int
    buffer_size: int
    buffer_capacity: int


class Policy:
    """The same source in every step; the base of the policies that choose."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def decide(self, context: StepContext) -> Decision:
        """The decision for one optimizer step."""
        return Decision(self.source)

    def observe(self, validation_loss: float, *, begun: bool) -> bool:
        """Takes the validation loss; returns whether the policy changed. `begun` is False during a warm-up."""
        return False

    def metrics(self) -> dict[str, float]:
        """Numbers to log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable state for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""


class MixedPolicy(Policy):
    """Fresh student responses with probability `fraction`, else the data set (GKD, Agarwal et al., ICLR 2024)."""

    def __init__(self, fraction: float) -> None:
        super().__init__(Source.FRESH)
        self.fraction = fraction

    def decide(self, context: StepContext) -> Decision:
        return Decision(Source.FRESH if context.draw < self.fraction else Source.DATA)


class AdaptiveOffPolicy(Policy):
    """Fresh or replayed student responses with probability φ, else the data set (DistiLLM, Ko et al., ICML 2024)."""

    def __init__(self, schedule: AdaptiveSchedule) -> None:
        super().__init__(Source.DATA)
        self.schedule = schedule

    def decide(self, context: StepContext) -> Decision:
        schedule = self.schedule
        if context.draw >= schedule.phi:
            return Decision(Source.DATA)
        due = context.draw < schedule.generation_probability(context.step, context.total_steps)
        if due or schedule.must_generate(context.buffer_size, context.buffer_capacity, context.batch_size):
            return Decision(Source.FRESH, store=True, draw_from_buffer=not schedule.trains_on_fresh_batch)
        return Decision(Source.REPLAY, draw_from_buffer=True)

    def observe(self, validation_loss: float, *, begun: bool) -> bool:
        if begun:
            return self.schedule.observe(validation_loss)
        self.schedule.rebase(validation_loss)
        return False

    def metrics(self) -> dict[str, float]:
        return {"phi": self.schedule.phi}

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": type(self.schedule).__name__, **asdict(self.schedule)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.phi = float(state["phi"])
        reference = state["reference_loss"]
        self.schedule.reference_loss = None if reference is None else float(reference)


def reads_responses(name: str, *, mixed_fraction: float, warmup_steps: int) -> bool:
    """Whether some step trains on responses of the data set; where none does, rows of a prompt alone are enough.

    Args:
        name: policy name.
        mixed_fraction: on-policy probability of `mixed`.
        warmup_steps: optimizer steps of a warm-up, which are on the data set whatever the policy.

    Example:
        >>> reads_responses("on_policy", mixed_fraction=0.5, warmup_steps=0)
        False
    """
    writes = name in _WRITING or (name == "mixed" and mixed_fraction == 1)
    return warmup_steps > 0 or not writes


def make_policy(name: str, *, mixed_fraction: float, schedule: AdaptiveSchedule) -> Policy:
    """The policy called `name` (one of `POLICIES`).

    Args:
        name: policy name.
        mixed_fraction: on-policy probability of `mixed`.
        schedule: φ's rule, used by `adaptive_off_policy`.

    Raises:
        ValueError: unknown name.
    """
    if name == "mixed":
        return MixedPolicy(mixed_fraction)
    if name == "adaptive_off_policy":
        return AdaptiveOffPolicy(schedule)
    fixed = {
        "dataset": Source.DATA,
        "teacher_responses": Source.TEACHER,
        "on_policy": Source.FRESH,
        "batched_on_policy": Source.EPOCH,
    }
    if name not in fixed:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}; got {name!r}")
    return Policy(fixed[name])
