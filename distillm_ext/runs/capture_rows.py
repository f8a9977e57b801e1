"""Fills a cache: every row of a data set meets the teacher once, whatever happens on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..teacher.writer import CacheWriter

# Batches whose rows are sorted by length together: little padding, and the rows of a shard still lie close together.
_WINDOW = 32


class TokenRows(Protocol):
    """Token rows by number, as a `datasets.Dataset` or a list has them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@dataclass
class CaptureCount:
    """What a process has done.

    Attributes:
        rows: rows of this process so far, those found in the cache included.
        found: of them, rows that were in the cache already.
        tokens: targets whose logits were captured.
        seconds: time since the start.
    """

    rows: int = 0
    found: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def capture_rows(
    rows: TokenRows,
    writer: CacheWriter,
    compress: Callable[[Sequence[Mapping[str, Any]]], np.ndarray],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    flush_seconds: float = 300.0,
    progress: Callable[[CaptureCount], None] | None = None,
) -> CaptureCount:
    """Captures this process's share of the rows that the cache does not have, and flushes the writer.

    Args:
        rows: mappings with `input_ids` and `loss_mask` (1 at targets).
        writer: of this process. A killed capture that starts again with the same settings goes on where it stopped.
        compress: a batch of rows, each with its number under `row` → packed records [targets of all, record_bytes],
            end to end.
        batch_size: rows a batch.
        rank, world_size: of this process; it takes every world_size-th row.
        flush_seconds: the longest time whose work a kill can lose.
        progress: called after each batch.

    Returns:
        What was done.

    Raises:
        FloatingPointError: `compress` raised it, of a batch that has no records. What was captured before is kept.
    """
    count, started = CaptureCount(), time.monotonic()
    flushed = started
    for batch in _batches(rows, range(rank, len(rows), world_size), writer, batch_size, count):
        try:
            records = compress(batch)
        except FloatingPointError:
            writer.flush()
            raise
        sizes = [_targets(row).sum() for row in batch]
        for row, part in zip(batch, np.split(records, np.cumsum(sizes)[:-1]), strict=True):
            writer.add(row["input_ids"], _targets(row), part)
        now = time.monotonic()
        count.rows, count.tokens, count.seconds = count.rows + len(batch), count.tokens + len(records), now - started
        if now - flushed >= flush_seconds:
            writer.flush()
            flushed = now
        if progress is not None:
            progress(count)
    writer.flush()
    return count


def _batches(
    rows: TokenRows, numbers: Sequence[int], writer: CacheWriter, batch_size: int, count: CaptureCount
) -> Iterator[list[Mapping[str, Any]]]:
    """Batches of rows that are not in the cache; rows that are, or that repeat one of the same window, are counted."""
    window: dict[tuple[bytes, bytes], Mapping[str, Any]] = {}

    def sorted_batches() -> Iterator[list[Mapping[str, Any]]]:
        ordered = sorted(window.values(), key=lambda row: len(row["input_ids"]), reverse=True)
        window.clear()
        for start in range(0, len(ordered), batch_size):
            yield ordered[start : start + batch_size]

    for number in numbers:
        row = rows[number]
        key = (np.asarray(row["input_ids"]).tobytes(), _targets(row).tobytes())
        if key in window or writer.has(row["input_ids"], _targets(row)):
            count.rows, count.found = count.rows + 1, count.found + 1
            continue
        window[key] = {**row, "row": number}
        if len(window) >= _WINDOW * batch_size:
            yield from sorted_batches()
    yield from sorted_batches()


def _targets(row: Mapping[str, Any]) -> np.ndarray:
    """[length] bool. Nothing precedes the first token, so it never is a target."""
    mask = np.array(row["loss_mask"], dtype=bool)
    mask[:1] = False
    return mask
