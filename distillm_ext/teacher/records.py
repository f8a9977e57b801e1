"""`RecordStore`: packed teacher logits by sequence, in memory up to a limit, beyond it in a memory-mapped file.

A sequence has one record of `record_bytes` bytes per target. Records are only kept, never looked into.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

# Records by which a spill file grows, at least.
_GROWTH = 1024


@dataclass
class MemoryBudget:
    """Bytes that several stores may hold in memory together.

    Attributes:
        limit: most bytes.
        used: bytes held.
    """

    limit: int
    used: int = 0

    def take(self, count: int) -> bool:
        """Reserves `count` bytes, if they are left."""
        if self.used + count > self.limit:
            return False
        self.used += count
        return True

    def give_back(self, count: int) -> None:
        """Ends a reservation."""
        self.used -= count


class SpillFile:
    """Records in numbered slots of a memory-mapped file. Slots are reused; the file grows and never shrinks.

    The file belongs to this object: it is made new at the first record, over what a killed run left there, and removed
    with the object. What must outlive the process is in checkpoints.

    Args:
        path: where it goes.
        record_bytes: size of a slot.
    """

    def __init__(self, path: Path, record_bytes: int) -> None:
        self.path = path
        self.record_bytes = record_bytes
        self.used = 0
        self._file: BinaryIO | None = None
        self._map: np.ndarray = np.empty((0, record_bytes), dtype=np.uint8)
        self._free: list[int] = []
        self._touched = 0

    def put(self, records: np.ndarray) -> np.ndarray:
        """Stores [n, record_bytes] and returns their slots [n]."""
        if len(self._free) < len(records):
            self._grow(len(records) - len(self._free))
        slots = np.array([self._free.pop() for _ in range(len(records))], dtype=np.int64)
        self._map[slots] = records
        self.used += len(slots)
        self._touched = max(self._touched, int(slots.max(initial=-1)) + 1)
        return slots

    def get(self, slots: np.ndarray) -> np.ndarray:
        """[n, record_bytes], a copy."""
        return self._map[slots]

    def content(self) -> np.ndarray:
        """[slots, record_bytes], the file itself as far as it was ever used."""
        return np.asarray(self._map[: self._touched])

    def release(self, slots: np.ndarray) -> None:
        """Gives slots back."""
        self._free.extend(slots.tolist())
        self.used -= len(slots)

    def _grow(self, count: int) -> None:
        before = len(self._map)
        after = before + max(count, _GROWTH, before // 2)
        if self._file is None:
            self._file = _new_file(self.path)
            weakref.finalize(self, _remove, self._file, self.path)
        self._file.truncate(after * self.record_bytes)
        self._map = np.memmap(self._file, dtype=np.uint8, mode="r+", shape=(after, self.record_bytes))
        # From the end, so that pop hands them out in rising order.
        self._free[:0] = range(after - 1, before - 1, -1)


def _new_file(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own: one with this name may still be mapped by an earlier object.
    path.unlink(missing_ok=True)
    return path.open("w+b")


def _remove(file: BinaryIO, path: Path) -> None:
    mine = os.fstat(file.fileno()).st_ino
    file.close()
    if path.exists() and path.stat().st_ino == mine:
        path.unlink()


class RecordStore:
    """Records by sequence key.

    Args:
        record_bytes: bytes of one record.
        budget: of memory, shared with other stores. What does not fit goes to the spill file.
        spill: path of the spill file.
    """

    def __init__(self, record_bytes: int, budget: MemoryBudget, spill: Path) -> None:
        self.record_bytes = record_bytes
        self.budget = budget
        self._memory: dict[bytes, np.ndarray] = {}
        self._slots: dict[bytes, np.ndarray] = {}
        self._file = SpillFile(spill, record_bytes)
        self._memory_bytes = 0

    def __len__(self) -> int:
        return len(self._memory) + len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._memory or key in self._slots

    def keys(self) -> Iterator[bytes]:
        """All keys, those in memory first."""
        yield from self._memory
        yield from self._slots

    @property
    def memory_bytes(self) -> int:
        """Bytes of records in memory."""
        return self._memory_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of records in the spill file."""
        return self._file.used * self.record_bytes

    def put(self, key: bytes, records: np.ndarray) -> None:
        """Stores [n, record_bytes] uint8 under `key`; a key that is there keeps what it has.

        Raises:
            ValueError: records of another size.
        """
        if records.ndim != 2 or records.shape[1] != self.record_bytes or records.dtype != np.uint8:
            raise ValueError(
                f"records: expected uint8 [n, {self.record_bytes}], got {records.dtype} {list(records.shape)}"
            )
        if key in self:
            return
        if self.budget.take(records.nbytes):
            self._memory[key] = records.copy()
            self._memory_bytes += records.nbytes
        else:
            self._slots[key] = self._file.put(records)

    def get(self, key: bytes) -> np.ndarray | None:
        """[n, record_bytes], or None where the key is unknown."""
        records = self._memory.get(key)
        if records is not None:
            return records
        slots = self._slots.get(key)
        return None if slots is None else self._file.get(slots)

    def retain(self, keys: Collection[bytes]) -> None:
        """Drops every other key."""
        for key in [key for key in self._memory if key not in keys]:
            size = self._memory.pop(key).nbytes
            self._memory_bytes -= size
            self.budget.give_back(size)
        for key in [key for key in self._slots if key not in keys]:
            self._file.release(self._slots.pop(key))

    def pack(self) -> dict[str, Tensor]:
        """The content as tensors, for a checkpoint; those in the file stay there, as a memory-mapped tensor.

        keys [n, key bytes] and counts [n], those in memory first; records [.., record_bytes] of the former; spilled
        [.., record_bytes] and slots of the latter.
        """
        keys = list(self.keys())
        names = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1 if keys else 0)
        sizes = [len(held) for held in (*self._memory.values(), *self._slots.values())]
        empty = np.empty((0, self.record_bytes), dtype=np.uint8)
        return {
            "keys": torch.from_numpy(names.copy()),
            "counts": torch.tensor(sizes, dtype=torch.int64),
            "records": torch.from_numpy(np.concatenate([empty, *self._memory.values()])),
            "spilled": torch.from_numpy(self._file.content()),
            "slots": torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *self._slots.values()])),
        }

    def unpack(self, packed: dict[str, Tensor], *, only: Collection[bytes] | None = None) -> None:
        """Adds the content of `pack`, or the part of it under the keys `only`."""
        for key, records in unpack_records(packed):
            if only is None or key in only:
                self.put(key, records)


def unpack_records(packed: dict[str, Tensor]) -> Iterator[tuple[bytes, np.ndarray]]:
    """(key, records) of what `RecordStore.pack` made.

    Raises:
        ValueError: the counts do not add up, so the file is damaged.
    """
    keys, counts, records, spilled, slots = (
        packed[name].numpy() for name in ("keys", "counts", "records", "spilled", "slots")
    )
    in_memory = len(records)
    fits = len(slots) == 0 or (slots.min() >= 0 and slots.max() < len(spilled))
    if len(keys) != len(counts) or int(counts.sum()) != in_memory + len(slots) or not fits:
        raise ValueError(
            f"stored teacher logits: {len(keys)} keys and {len(counts)} counts that add up to {int(counts.sum())} do "
            f"not belong to {in_memory} records in memory and {len(slots)} in a file of {len(spilled)}"
        )
    for key, end, count in zip(keys, np.cumsum(counts), counts, strict=True):
        begin = int(end - count)
        inside = end <= in_memory
        yield key.tobytes(), records[begin:end] if inside else spilled[slots[begin - in_memory : end - in_memory]]
