"""The replay buffer: the newest student-generated sequences of this process, sampled uniformly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import Tensor

from distillm_ext.data.draws import Stream, generator
from distillm_ext.data.sequences import TokenSequence, pack_sequences, unpack_sequences


class ReplayBuffer:
    """A bounded first-in-first-out store of `TokenSequence`.

    Draws are a function of (seed, step, rank): the buffer has no generator of its own to save, and nothing that happens
    to a global one can change what is replayed.

    Args:
        capacity: most sequences of this process, ≥ 1.
        seed: run seed.
        rank: process index.

    Raises:
        ValueError: capacity < 1.
    """

    def __init__(self, capacity: int, *, seed: int, rank: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1 sequence per process, got {capacity}")
        self.capacity = capacity
        self.seed = seed
        self.rank = rank
        self._sequences: deque[TokenSequence] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._sequences)

    def extend(self, sequences: Iterable[TokenSequence]) -> None:
        """Appends sequences; the oldest leave when the capacity is reached."""
        self._sequences.extend(sequences)

    def sample(self, count: int, *, step: int) -> list[TokenSequence]:
        """`count` different sequences, drawn uniformly.

        Raises:
            ValueError: the buffer holds fewer than `count`.
        """
        if count > len(self):
            raise ValueError(f"count: the buffer holds {len(self)} sequences, cannot draw {count} different ones")
        picks = generator(self.seed, Stream.REPLAY, step, self.rank).choice(len(self), size=count, replace=False)
        return [self._sequences[int(pick)] for pick in picks]

    def sequences(self) -> list[TokenSequence]:
        """All sequences, oldest first."""
        return list(self._sequences)

    def clear(self) -> None:
        """Empties the buffer."""
        self._sequences.clear()

    def pack(self) -> dict[str, Tensor]:
        """The content as tensors, oldest first, for a checkpoint."""
        return pack_sequences(self._sequences)

    def unpack(self, packed: dict[str, Tensor]) -> None:
        """Replaces the content by that of `pack`."""
        self.clear()
        self.extend(unpack_sequences(packed))
