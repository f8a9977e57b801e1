"""Where the row of a sequence is: binary search among the hashes of the tokens, so that order does not matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from .shard import KEY_BYTES, TOKEN_KEY_BYTES

_Place = tuple[int, int]


class RowIndex:
    """Keys of all rows of all shards. Equal keys, from ranks that met the same example, count once: the first."""

    def __init__(self, keys: Iterable[np.ndarray]) -> None:
        tables = list(keys)
        stacked = np.concatenate(tables) if tables else np.empty((0, KEY_BYTES), np.uint8)
        # Big-endian words, so that they compare as the bytes do.
        words = np.ascontiguousarray(stacked).view(">u8").astype(np.uint64)
        order = np.lexsort(words.T[::-1])
        words = words[order]
        new = np.ones(len(words), bool)
        new[1:] = (words[1:] != words[:-1]).any(axis=1)
        self._words = words[new]
        starts = np.cumsum([0, *map(len, tables)])
        place = order[new]
        self._shard = np.searchsorted(starts, place, side="right") - 1
        self._row = place - starts[self._shard]

    def __len__(self) -> int:
        return len(self._words)

    def place(self, number: int) -> _Place:
        """Shard and row of the `number`-th key in the order of storage."""
        return self._places[number]

    @cached_property
    def _places(self) -> list[_Place]:
        order = np.lexsort((self._row, self._shard))
        return list(zip(self._shard[order].tolist(), self._row[order].tolist(), strict=True))

    def find(self, key: bytes) -> Iterator[_Place]:
        """Places whose key starts with `key`: a whole one, or the part that depends on the tokens alone."""
        words = np.frombuffer(key, ">u8").astype(np.uint64)
        first, last = np.searchsorted(self._words[:, 0], words[0], "left"), len(self._words)
        for index in range(int(first), last):
            if not (self._words[index, : len(words)] == words).all():
                if self._words[index, 0] != words[0]:
                    return
                continue
            yield int(self._shard[index]), int(self._row[index])


assert KEY_BYTES % 8 == 0 and TOKEN_KEY_BYTES % 8 == 0
