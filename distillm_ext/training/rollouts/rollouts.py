"""Turns a policy's decision into the micro-batches of one optimizer step: generates, replays, or passes the data on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distillm_ext.data.batches import DistillationCollator, move_batch
from distillm_ext.data.draws import Stream, derive_seed, preserved_rng
from distillm_ext.data.sequences import TokenSequence, pack_sequences, unpack_sequences
from distillm_ext.generation import Engine, SamplingParams
from distillm_ext.generation.positions import limits_within
from distillm_ext.training.rollouts.policies import Decision, Source
from distillm_ext.training.rollouts.replay import ReplayBuffer

Batch = dict[str, Any]


class ResponseSource(Protocol):
    """Anything that answers prompts: the student, the teacher, through whatever engine."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One non-empty response per prompt, a function of the prompt and its seed."""
        ...


@dataclass(frozen=True)
class EngineResponses:
    """Answers prompts with an engine that holds the newest weights: a `ResponseSource`.

    Attributes:
        engine: generates.
        params: sampling parameters.
        max_new_tokens: most tokens of a response.
        max_length: most tokens of prompt and response.
        eos_token_ids: tokens that end a response.
        vocab_size: only ids below it are generated: the other model may not know more.
        weights: the trained model's weights, for an engine that has a copy of its own.
    """

    engine: Engine
    params: SamplingParams
    max_new_tokens: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int | None = None
    weights: Callable[[], Iterable[tuple[str, Tensor]]] = tuple

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        """One response per prompt, a function of the weights, the prompt and its seed.

        Raises:
            ValueError: a prompt that fills `max_length`; the message names it.
        """
        if not self.engine.shares_weights:
            self.engine.update_weights(self.weights())
        lengths = [len(prompt) for prompt in prompts]
        limits = limits_within([self.max_new_tokens] * len(prompts), lengths, self.max_length, "max_length")
        return self.engine.generate(
            prompts, self.params, max_new_tokens=limits, eos_token_ids=self.eos_token_ids, seeds=seeds,
            vocab_size=self.vocab_size,
        ).token_ids  # fmt: skip


@dataclass
class ResponseStore:
    """Responses by training row, and the epoch they belong to (None: they never go out of date)."""

    epoch: int | None = None

    def __post_init__(self) -> None:
        self.by_row: dict[int, TokenSequence] = {}

    def add(self, sequences: Sequence[TokenSequence]) -> None:
        """Stores sequences under their rows."""
        self.by_row.update((sequence.row, sequence) for sequence in sequences)

    def pack(self) -> dict[str, Tensor]:
        """The content as tensors, for a checkpoint."""
        return pack_sequences(self.by_row.values())

    def unpack(self, packed: dict[str, Tensor]) -> None:
        """Adds the content of `pack`."""
        self.add(unpack_sequences(packed))


class Rollouts:
    """Realises decisions. Every generated token is a function of (seed, step, row) and of the model's weights.

    Args:
        collator: makes batches.
        buffer: replay buffer of this process.
        student, teacher: sources of responses.
        prompts_of_rows: gives the training sequences of an epoch-wide generation, as (prompt, row), for this process.
        gather: returns the sequences of all processes (identity for one).
        seed: run seed.
        device: where batches go.
    """

    def __init__(
        self,
        *,
        collator: DistillationCollator,
        buffer: ReplayBuffer,
        student: ResponseSource,
        teacher: ResponseSource,
        prompts_of_rows: Callable[[], list[tuple[list[int], int]]],
        gather: Callable[[list[TokenSequence]], list[TokenSequence]],
        seed: int,
        device: torch.device,
    ) -> None:
        self.collator = collator
        self.buffer = buffer
        self.student = student
        self.teacher = teacher
        self.prompts_of_rows = prompts_of_rows
        self.gather = gather
        self.seed = seed
        self.device = device
        self.store = ResponseStore()

    def realise(self, decision: Decision, batches: list[Batch], *, step: int, epoch: int) -> list[Batch]:
        """The micro-batches to train on, as many and as large as `batches`.

        Args:
            decision: what the policy chose.
            batches: micro-batches of the data set.
            step: optimizer step, the counter of every draw.
            epoch: current epoch (0-based).
        """
        if decision.source is Source.DATA:
            return [{**batch, "ground_truth": True} for batch in batches]
        sizes = [len(batch["row"]) for batch in batches]
        with preserved_rng(self.device):
            sequences = self._sequences(decision, batches, step=step, epoch=epoch, count=sum(sizes))
        starts = np.cumsum([0, *sizes])
        parts = [sequences[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        ground_truth = decision.source is Source.TEACHER
        return [{**self._batch(part), "ground_truth": ground_truth} for part in parts]

    def _sequences(
        self, decision: Decision, batches: list[Batch], *, step: int, epoch: int, count: int
    ) -> list[TokenSequence]:
        if decision.source is Source.EPOCH:
            return self._from_epoch(_prompts(batches), step=step, epoch=epoch)
        if decision.source is Source.TEACHER:
            return self._from_teacher(_prompts(batches))
        fresh: list[TokenSequence] = []
        if decision.source is Source.FRESH:
            fresh = self._answer(self.student, _prompts(batches), Stream.STUDENT_RESPONSE, step)
            if decision.store:
                self.buffer.extend(fresh)
        return self.buffer.sample(count, step=step) if decision.draw_from_buffer else fresh

    def _answer(
        self, source: ResponseSource, prompts: list[tuple[list[int], int]], stream: Stream, *counters: int
    ) -> list[TokenSequence]:
        seeds = [derive_seed(self.seed, stream, *counters, row) for _, row in prompts]
        responses = source([prompt for prompt, _ in prompts], seeds)
        return [
            TokenSequence.join(prompt, response, row)
            for (prompt, row), response in zip(prompts, responses, strict=True)
        ]

    def _from_teacher(self, prompts: list[tuple[list[int], int]]) -> list[TokenSequence]:
        missing = {row: prompt for prompt, row in prompts if row not in self.store.by_row}
        if missing:
            asked = [(prompt, row) for row, prompt in missing.items()]
            self.store.add(self._answer(self.teacher, asked, Stream.TEACHER_RESPONSE))
        return [self.store.by_row[row] for _, row in prompts]

    def _from_epoch(self, prompts: list[tuple[list[int], int]], *, step: int, epoch: int) -> list[TokenSequence]:
        if self.store.epoch != epoch:
            self.store = ResponseStore(epoch)
            mine = self._answer(self.student, self.prompts_of_rows(), Stream.STUDENT_RESPONSE, step)
            self.store.add(self.gather(mine))
        return [self.store.by_row[row] for _, row in prompts]

    def pack(self) -> dict[str, Tensor]:
        """Buffer and store of this process as tensors, for a checkpoint."""
        buffer = {f"replay.{name}": tensor for name, tensor in self.buffer.pack().items()}
        return {**buffer, **{f"store.{name}": tensor for name, tensor in self.store.pack().items()}}

    def unpack(self, saved: Sequence[Mapping[str, Tensor]], *, store_epoch: int | None, rank: int, world: int) -> None:
        """Restores `pack` from those of every process that saved.

        As many processes as before each take their own buffer; another number deal out all of them, in order.
        """

        def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        if len(saved) == world:
            self.buffer.unpack(part(saved[rank], "replay."))
        else:
            pooled = [sequence for tensors in saved for sequence in unpack_sequences(part(tensors, "replay."))]
            self.buffer.clear()
            self.buffer.extend(pooled[rank::world])
        self.store = ResponseStore(store_epoch)
        for tensors in saved:
            self.store.unpack(part(tensors, "store."))

    def _batch(self, sequences: Sequence[TokenSequence]) -> Batch:
        return move_batch(self.collator([sequence.to_feature() for sequence in sequences]), self.device)


def _prompts(batches: Sequence[Batch]) -> list[tuple[list[int], int]]:
    """(prompt, row) of every row of the micro-batches."""
    found = []
    for batch in batches:
        columns = (batch["input_ids"], batch["prompt_length"], batch["row"])
        for ids, length, row in zip(*(column.tolist() for column in columns), strict=True):
            found.append((ids[:length], row))
    return found
