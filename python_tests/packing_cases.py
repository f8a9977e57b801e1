"""Compressed logits as NumPy arrays for the tests of the packed codec, and what a codec may do to them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from distillm_ext import (
    CompressedLogits,
    _codec,  # noqa: PLC2701  (the compiled codec, imported without torch)
)
from distillm_ext.reference.compression import compress_logits_reference

BITS = {"q4": 4, "q6": 6, "q8": 8}
CODECS = ("q4", "q6", "q8", "fp16", "exact")


@dataclass(frozen=True)
class Case:
    """Fields of R positions."""

    ids: np.ndarray
    logprobs: np.ndarray
    log_norm: np.ndarray
    tail_logprob: np.ndarray
    label_logprob: np.ndarray | None
    valid: np.ndarray
    counts: np.ndarray | None
    vocab_size: int
    temperatures: tuple[float, ...]

    @property
    def k(self) -> int:
        return self.ids.shape[1]

    def settings(self, codec: str) -> tuple:
        """What `_codec` asks for beside arrays."""
        labels, counts = self.label_logprob is not None, self.counts is not None
        return (codec, self.k, self.vocab_size, self.temperatures, labels, counts)

    def arrays(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self)[:7])

    def pack(self, codec: str) -> np.ndarray:
        return _codec.pack_logits(*self.arrays(), self.vocab_size, self.temperatures, codec)

    def unpack(self, packed: np.ndarray, codec: str) -> Case:
        return Case(*_codec.unpack_logits(packed, *self.settings(codec)), self.vocab_size, self.temperatures)

    def compressed(self) -> CompressedLogits:
        tensors = [None if x is None else torch.from_numpy(x) for x in self.arrays()]
        return CompressedLogits(*tensors, temperatures=self.temperatures, vocab_size=self.vocab_size)


def from_compressed(compressed: CompressedLogits) -> Case:
    names = [field.name for field in fields(Case)]
    values = [getattr(compressed, name) for name in names]
    return Case(*[value.numpy() if isinstance(value, torch.Tensor) else value for value in values])


def logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Rows of several kinds: plain, NaN, mostly -inf, one finite entry, ties, very peaked."""
    # NumPy's numbers are the same on every CPU; torch's depend on its vector width.
    z = torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32))
    kinds = [
        lambda row: row,
        lambda row: row.index_fill_(0, torch.tensor([vocab // 2]), torch.nan),
        lambda row: row[1:].fill_(-torch.inf),
        lambda row: row.round_(),
        lambda row: row.mul_(1000),
        lambda row: row[: vocab // 3].fill_(-torch.inf),
    ]
    for index in range(rows):
        kinds[index % len(kinds)](z[index])
    return z


def make(
    rows: int,
    vocab: int,
    k: int,
    method: str = "topk",
    temperatures: tuple[float, ...] = (1.0, 2.0),
    labels: bool = True,
    seed: int = 0,
    spread: float = 3.0,
) -> Case:
    targets = torch.arange(rows) % vocab
    if rows:
        targets[0] = -100
    compressed = compress_logits_reference(
        logits(rows, vocab, seed, spread),
        k,
        method=method,
        temperatures=temperatures,
        labels=targets if labels else None,
        position=torch.arange(rows),
    )
    return from_compressed(compressed)


def canonical(case: Case) -> Case:
    """Ids ascending among equal log-probabilities: what the sorting codecs give."""
    order = np.lexsort((np.where(case.ids < 0, 2**31 - 1, case.ids), -case.logprobs), axis=-1)

    def sort(x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, order, axis=-1)

    counts = None if case.counts is None else sort(case.counts)
    return replace(case, ids=sort(case.ids), logprobs=sort(case.logprobs), counts=counts)


def by_id(case: Case) -> dict[tuple[int, int], tuple[float, int]]:
    """(row, id) -> log-probability and count of every kept entry."""
    counts = np.zeros_like(case.ids) if case.counts is None else case.counts
    places = np.argwhere(case.ids >= 0)
    return {(r, int(case.ids[r, i])): (float(case.logprobs[r, i]), int(counts[r, i])) for r, i in places}


def value_bound(case: Case, codec: str, row: int) -> np.ndarray:
    """The documented bound of the error of each kept entry of a row (distillm_ext/packing.py)."""
    values = case.logprobs[row][case.ids[row] >= 0].astype(np.float64)
    if codec == "exact" or values.size == 0:
        return np.zeros_like(values)
    if codec == "fp16":
        # The bound of the shift is that of the entries that weigh: the largest ones.
        return np.abs(values) * 2.0**-11 + np.abs(values).min() * 2.0**-11 + 2.0**-25 + 5e-4
    # What rounds the tail, 2^-23 at most, is more of a kept mass that is small itself.
    of_tail = 2.0**-23 / np.exp(values).sum()
    spread = values.max() - values.min()
    below = np.maximum(values.max() - values - 32, 0)  # what the floor of 32 nats cuts off
    return 2 * min(spread, 32) / (2 * (2 ** BITS[codec] - 1)) * 1.001 + below + 6e-4 + of_tail
