"""One file of a cache: an Arrow IPC file with one record batch, one row per example, read through a memory map.

Columns: key (24 bytes, `row_key`), tokens (int32 list), response_start (int32, the first target, or the length), spans
(int32 list: start, end of each run of targets), records (bytes), offsets (int64 list, method "sample" only: where each
trimmed record starts), checksum (CRC-32 of all the other columns of the row).

Every byte of a shard is protected. The long buffers (tokens, spans, records, offsets) by the rows' checksums, which are
compared when a row is read; everything else, Arrow's own structures included, by a hash in the manifest. That is
compared before Arrow sees the file, so that opening costs time in proportion to rows and not to bytes. The hash of the
whole file is for `TeacherCache.open(..., verify="full")`.
"""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from .errors import CacheDamaged
from .manifest import ShardInfo

KEY_BYTES = 24
TOKEN_KEY_BYTES = 16
_BULK = ("tokens", "spans", "records", "offsets")
_PIECE = 1 << 22


@dataclass(frozen=True)
class StoredRow:
    """One example as stored.

    Attributes:
        tokens: [length] int32.
        spans: [2 n] int32: starts and ends of the runs of target tokens.
        records: [bytes] uint8, the packed positions end to end.
        offsets: [positions + 1] int64 where each record starts; empty where all have one size.
    """

    tokens: np.ndarray
    spans: np.ndarray
    records: np.ndarray
    offsets: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.spans.nbytes + self.records.nbytes + self.offsets.nbytes

    @property
    def response_start(self) -> int:
        return int(self.spans[0]) if len(self.spans) else len(self.tokens)

    @property
    def targets(self) -> np.ndarray:
        """[positions] int64, the places of the target tokens."""
        pairs = self.spans.reshape(-1, 2)
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in pairs] or [np.empty(0, np.int64)])

    @property
    def positions(self) -> int:
        return int((self.spans[1::2] - self.spans[::2]).sum())

    def key(self) -> bytes:
        return row_key(self.tokens, self.spans)

    def checksum(self) -> int:
        crc = zlib.crc32(self.key() + self.response_start.to_bytes(8, "little", signed=True))
        for part in (self.spans, self.records, self.offsets):
            crc = zlib.crc32(part.data, crc)
        return crc


def token_key(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(_int32(tokens).tobytes(), digest_size=TOKEN_KEY_BYTES).digest()


def row_key(tokens: np.ndarray, spans: np.ndarray) -> bytes:
    """16 bytes that depend on the tokens, then 8 that depend on which of them are targets."""
    rest = hashlib.blake2b(_int32(spans).tobytes(), digest_size=KEY_BYTES - TOKEN_KEY_BYTES).digest()
    return token_key(tokens) + rest


def _int32(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype="<i4")


def spans_of(targets: np.ndarray) -> np.ndarray:
    """Ascending places -> start, end of each run."""
    breaks = np.flatnonzero(np.diff(targets) != 1) + 1
    starts, ends = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(targets)]])
    if len(targets) == 0:
        return np.empty(0, np.int32)
    return np.stack([targets[starts], targets[ends - 1] + 1], axis=1).reshape(-1).astype(np.int32)


def _batch(rows: Sequence[StoredRow]) -> pa.RecordBatch:
    def lists(arrays: list[np.ndarray], dtype: type) -> pa.Array:
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        values = pa.array(np.concatenate(arrays).astype(dtype, copy=False))
        return pa.LargeListArray.from_arrays(pa.array(offsets), values)

    columns = {
        "key": pa.array([row.key() for row in rows], pa.binary(KEY_BYTES)),
        "tokens": lists([row.tokens for row in rows], np.int32),
        "response_start": pa.array([row.response_start for row in rows], pa.int32()),
        "spans": lists([row.spans for row in rows], np.int32),
        "records": lists([row.records for row in rows], np.uint8),
        "offsets": lists([row.offsets for row in rows], np.int64),
        "checksum": pa.array([row.checksum() for row in rows], pa.uint32()),
    }
    return pa.RecordBatch.from_pydict(columns)


def write_shard(temporary: Path, name: str, rows: Sequence[StoredRow]) -> ShardInfo:
    """Writes the shard to a temporary name; the caller moves it into place as `name`."""
    batch = _batch(rows)
    with open(temporary, "wb") as out, pa.ipc.new_file(out, batch.schema) as writer:
        writer.write_batch(batch)
    with open(temporary, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        bulk = _bulk_ranges(memory)
        return ShardInfo(
            file=name,
            rows=len(rows),
            positions=sum(row.positions for row in rows),
            bytes=len(memory),
            sha256=_digest(memory, [(0, len(memory))]),
            structure=_digest(memory, _complement(bulk, len(memory))),
            bulk=bulk,
        )


def _bulk_ranges(memory: mmap.mmap) -> tuple[tuple[int, int], ...]:
    buffer = pa.py_buffer(memory)
    batch = pa.ipc.open_file(buffer).get_batch(0)
    ranges = []
    for name in _BULK:
        values = batch.column(name).values
        start = values.buffers()[1].address - buffer.address if len(values) else 0
        ranges.append((start, start + len(values) * values.type.bit_width // 8))
        del values
    del batch, buffer
    return tuple(sorted(pair for pair in ranges if pair[0] < pair[1]))


def _complement(ranges: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for pair in ranges for edge in pair), size]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _digest(memory: mmap.mmap, ranges: Sequence[tuple[int, int]]) -> str:
    digest = hashlib.sha256()
    for start, stop in ranges:
        for at in range(start, stop, _PIECE):
            digest.update(memory[at : min(at + _PIECE, stop)])
    return digest.hexdigest()


class Shard:
    """A shard open for reading. `row(i)` is one seek, and compares the row's checksum."""

    def __init__(self, path: Path, info: ShardInfo, *, full: bool = False) -> None:
        self.path = path
        if not path.exists():
            raise CacheDamaged(f"{path} is missing; restore it or capture again")
        if path.stat().st_size != info.bytes:
            raise CacheDamaged(f"{path} has {path.stat().st_size} bytes, {info.bytes} were written; capture again")
        with open(path, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ranges = _complement(info.bulk, info.bytes)
        if _digest(self._memory, ranges) != info.structure:
            raise self._damaged("its structure is not what was written")
        if full and _digest(self._memory, [(0, info.bytes)]) != info.sha256:
            raise self._damaged("its hash is not that of the manifest")
        batch = pa.ipc.open_file(pa.py_buffer(self._memory)).get_batch(0)
        if batch.num_rows != info.rows:
            raise self._damaged(f"it has {batch.num_rows} rows, {info.rows} were written")
        self._lists = {name: _list_views(batch.column(name)) for name in _BULK}
        keys = np.frombuffer(batch.column("key").buffers()[1], np.uint8, info.rows * KEY_BYTES)
        self.keys = keys.reshape(info.rows, KEY_BYTES)
        self._checksums = batch.column("checksum").to_numpy()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[StoredRow]:
        return (self.row(index) for index in range(len(self)))

    def row(self, index: int) -> StoredRow:
        """Row `index`, its arrays read-only views of the memory map. Raises `CacheDamaged`."""
        parts = {}
        for name, (offsets, values) in self._lists.items():
            parts[name] = values[offsets[index] : offsets[index + 1]]
        row = StoredRow(**parts)
        if row.checksum() != int(self._checksums[index]):
            raise self._damaged(f"row {index} does not fit its checksum")
        return row

    def _damaged(self, what: str) -> CacheDamaged:
        return CacheDamaged(f"{self.path} is damaged: {what}; restore it or capture again")


def _list_views(column: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    return column.offsets.to_numpy(), column.values.to_numpy()
