"""Counter-based randomness: every draw is a function of (seed, stream, counters), with no state and no messages.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a key and a counter into random
bits. The same seed and counters give the same draw on every rank and after a resume, so nothing has to be saved,
broadcast, or kept in step with the global generators.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch

_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What a draw is for. Two streams never share a random number."""

    SOURCE = 0
    REPLAY = 1
    STUDENT_RESPONSE = 2
    TEACHER_RESPONSE = 3
    PLAIN_TEXT = 4


def generator(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """A generator that starts at (seed, stream, counters).

    Args:
        seed: run seed; taken modulo 2⁶⁴.
        stream: the purpose of the draws.
        counters: up to three integers, such as the step, the rank or the row.

    Raises:
        ValueError: more than three counters.
    """
    if len(counters) > 3:
        raise ValueError(f"counters: expected at most 3, got {len(counters)}")
    # numpy advances the lowest counter word with every block of four draws: it is left to numpy.
    words = [0, *(counter & _MASK for counter in counters), *[0] * (3 - len(counters))]
    key = [seed & _MASK, int(stream)]
    # Explicit uint64: a list with a word of 2⁶³ or more would go through float64 and lose its low bits.
    return np.random.Generator(
        np.random.Philox(counter=np.array(words, dtype=np.uint64), key=np.array(key, dtype=np.uint64))
    )


def uniform(seed: int, stream: Stream, *counters: int) -> float:
    """One draw from U[0, 1)."""
    return float(generator(seed, stream, *counters).random())


def derive_seed(seed: int, stream: Stream, *counters: int) -> int:
    """A seed in [0, 2⁶³) for something that is seeded by one integer."""
    return int(generator(seed, stream, *counters).integers(0, 1 << 63, dtype=np.int64))


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leaves Python's, NumPy's, torch's and the device's global generators as they were: whether a step generates must
    not change the dropout or the data order of the steps after it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
