"""When the student's own outputs are used: φ, and the validation loss that raises it.

DistiLLM (Ko et al., ICML 2024) trains on student-generated outputs (SGO) with probability φ, and raises φ when the
validation loss rises: the student then suffers from seeing only data-set responses. Its published code differs from
its paper; both rules are here.

| point              | `PaperSchedule`           | `ReferenceSchedule`                              |
|--------------------|---------------------------|--------------------------------------------------|
| reference loss     | previous validation loss  | loss at the last increase of φ, or before training |
| φ rises when       | loss > reference + ε      | loss ≥ reference + ε                             |
| batch after a generation | drawn from the buffer | the fresh batch itself                           |
| always generates while | buffer < one batch    | buffer not full                                  |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

REPLAY_RATIOS = ("decreasing", "constant", "increasing")


@dataclass
class AdaptiveSchedule(ABC):
    """φ and its reference loss.

    Attributes:
        phi: probability of training on student-generated outputs, in [0, 1].
        increment: what one increase adds to φ (1 / N_φ).
        threshold: ε, how much the validation loss must exceed the reference.
        replay_ratio: share of the SGO steps that generate at step t of T: "decreasing" φ·(1 − t/T), "constant" 0.5·φ,
            "increasing" φ·t/T.
        reference_loss: None before the first validation.
    """

    phi: float = 0.0
    increment: float = 0.1
    threshold: float = 0.1
    replay_ratio: str = "decreasing"
    reference_loss: float | None = None

    trains_on_fresh_batch: ClassVar[bool]

    @abstractmethod
    def rises(self, loss: float, reference: float) -> bool:
        """Whether this validation loss raises φ."""

    @abstractmethod
    def next_reference(self, loss: float, reference: float, rose: bool) -> float:
        """The reference loss after this validation."""

    @abstractmethod
    def must_generate(self, buffer_size: int, capacity: int, batch_size: int) -> bool:
        """Whether the buffer is still too small to replay from (all sizes in sequences of this process)."""

    def observe(self, loss: float) -> bool:
        """Takes a validation loss; returns whether φ rose. The first one only becomes the reference.

        Raises:
            FloatingPointError: the loss is NaN or inf, with which nothing can be compared.
        """
        _check_finite(loss)
        if self.reference_loss is None:
            self.reference_loss = loss
            return False
        rose = self.rises(loss, self.reference_loss)
        if rose:
            self.phi = min(self.phi + self.increment, 1.0)
        self.reference_loss = self.next_reference(loss, self.reference_loss, rose)
        return rose

    def rebase(self, loss: float) -> None:
        """Makes `loss` the reference without raising φ: for validations before the method itself has begun.

        Raises:
            FloatingPointError: as for `observe`.
        """
        _check_finite(loss)
        self.reference_loss = loss

    def generation_probability(self, step: int, total_steps: int) -> float:
        """Probability that step `step` (0-based) of `total_steps` generates, once the buffer can be replayed from."""
        progress = step / max(total_steps, 1)
        share = {"decreasing": 1.0 - progress, "constant": 0.5, "increasing": progress}[self.replay_ratio]
        return self.phi * share


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the validation loss is {loss}: the student diverged, or rows of the evaluation set are at fault; lower "
            "the learning rate, or check the data"
        )


@dataclass
class PaperSchedule(AdaptiveSchedule):
    """The rule of the paper's algorithm."""

    trains_on_fresh_batch: ClassVar[bool] = False

    def rises(self, loss: float, reference: float) -> bool:
        return loss > reference + self.threshold

    def next_reference(self, loss: float, reference: float, rose: bool) -> float:
        return loss

    def must_generate(self, buffer_size: int, capacity: int, batch_size: int) -> bool:
        return buffer_size < batch_size


@dataclass
class ReferenceSchedule(AdaptiveSchedule):
    """The rule of the published code."""

    trains_on_fresh_batch: ClassVar[bool] = True

    def rises(self, loss: float, reference: float) -> bool:
        return loss >= reference + self.threshold

    def next_reference(self, loss: float, reference: float, rose: bool) -> float:
        return loss if rose else reference

    def must_generate(self, buffer_size: int, capacity: int, batch_size: int) -> bool:
        return buffer_size < capacity


SCHEDULES: dict[str, type[AdaptiveSchedule]] = {"paper": PaperSchedule, "reference": ReferenceSchedule}
