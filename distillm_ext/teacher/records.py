"""`RecordStore`: packed teacher logits by sequence, in a temporary file that is read through a memory map.

A sequence has one record of `record_bytes` bytes per target. Records are only kept, never looked into.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor


class RecordStore:
    """Records by sequence key, one after the other in a temporary file.

    The system's page cache holds as much of the file as there is memory for. The file has no name: it goes with the
    object, or with the process, however that ends. What must outlive it is in checkpoints. A record that was written
    never moves within its file, and it is written by `pwrite`: written through a map, a full disk is a SIGBUS. A forked
    process may read the store; only one may add to it.

    Args:
        record_bytes: bytes of one record.
        folder: where the file goes at the first record; made if it is not there.

    Example:
        >>> store = RecordStore(144, Path("out"))
        >>> store.put(key, records)  # [n, 144] uint8
        >>> store.get(key)  # the same
    """

    def __init__(self, record_bytes: int, folder: Path) -> None:
        self.record_bytes = record_bytes
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._map: np.ndarray = np.empty((0, record_bytes), dtype=np.uint8)
        # First record and number of records of each key, in the order of the file.
        self._places: dict[bytes, tuple[int, int]] = {}
        # Records of these keys, and records in the file, where those of dropped keys stay until it is written anew.
        self._held = self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def keys(self) -> Collection[bytes]:
        """All keys."""
        return self._places.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of the records of all keys."""
        return self._held * self.record_bytes

    def put(self, key: bytes, records: np.ndarray) -> None:
        """Stores [n, record_bytes] uint8 under `key`; a key that is there keeps what it has.

        Raises:
            ValueError: records of another size.
            OSError: they cannot be written, as the disk is full; the store stays as it was.
        """
        if records.ndim != 2 or records.shape[1] != self.record_bytes or records.dtype != np.uint8:
            raise ValueError(
                f"records: expected uint8 [n, {self.record_bytes}], got {records.dtype} {list(records.shape)}"
            )
        if key in self:
            return
        self._write(records)
        self._places[key] = (self._end, len(records))
        self._held += len(records)
        self._end += len(records)

    def get(self, key: bytes) -> np.ndarray | None:
        """[n, record_bytes], a copy, or None where the key is unknown."""
        if key not in self:
            return None
        start, count = self._places[key]
        return self._content()[start : start + count].copy()

    def retain(self, keys: Collection[bytes]) -> None:
        """Drops every other key."""
        self._places = {key: place for key, place in self._places.items() if key in keys}
        self._held = sum(count for _, count in self._places.values())
        # No more records are copied than were dropped, and the file holds at most twice those of the keys.
        if self._end > 2 * self._held:
            self._write_anew()

    def pack(self) -> dict[str, Tensor]:
        """The content as tensors, for a checkpoint: keys [n, key bytes], counts [n], records [Σ counts, record_bytes].

        The records stay in the file, as a memory-mapped tensor. `spilled` and `slots` are empty: see `unpack`.
        """
        if self._end > self._held:
            self._write_anew()
        keys = list(self._places)
        names = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1 if keys else 0)
        return {
            "keys": torch.from_numpy(names.copy()),
            "counts": torch.tensor([count for _, count in self._places.values()], dtype=torch.int64),
            "records": torch.from_numpy(np.asarray(self._content()[: self._end])),
            "spilled": torch.empty(0, self.record_bytes, dtype=torch.uint8),
            "slots": torch.empty(0, dtype=torch.int64),
        }

    def unpack(self, packed: dict[str, Tensor], *, only: Collection[bytes] | None = None) -> None:
        """Adds the content of `pack`, or the part of it under the keys `only`.

        Earlier releases stored the last keys in another way: `records` ends before theirs, which are rows `slots` of
        `spilled`, in the order of the keys. Those releases read what this one packs.

        Raises:
            ValueError: the counts do not add up, so the file is damaged.
        """
        for key, records in _unpacked(packed):
            if only is None or key in only:
                self.put(key, records)

    def _write(self, records: np.ndarray) -> None:
        """Writes records behind the last one."""
        rest, offset = memoryview(records.tobytes()), self._end * self.record_bytes
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
            while rest:
                written = os.pwrite(self._file.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    error.errno, f"cannot keep teacher logits in a temporary file in {self.folder}: {error.strerror}"
                ) from error
            raise OSError(
                error.errno,
                f"teacher logits do not fit into a temporary file in {self.folder}, which has {offset / 2**20:.1f} MiB "
                f"of them ({error.strerror}); make room there, choose another output_dir, or keep fewer entries",
            ) from error

    def _content(self) -> np.ndarray:
        """[records in the file or fewer, record_bytes]: the file itself."""
        if self._file is not None and len(self._map) < self._end:
            self._map = np.memmap(self._file, dtype=np.uint8, mode="c", shape=(self._end, self.record_bytes))
        return self._map

    def _write_anew(self) -> None:
        """Puts the records of the keys into a new file; maps of the old one stay what they were."""
        content, fresh = self._content(), RecordStore(self.record_bytes, self.folder)
        for key, (start, count) in self._places.items():
            fresh.put(key, content[start : start + count])
        self._file, self._map, self._places, self._end = fresh._file, fresh._map, fresh._places, fresh._end


def _unpacked(packed: dict[str, Tensor]) -> Iterator[tuple[bytes, np.ndarray]]:
    keys, counts, records, spilled, slots = (
        packed[name].numpy() for name in ("keys", "counts", "records", "spilled", "slots")
    )
    in_records = len(records)
    fits = len(slots) == 0 or (slots.min() >= 0 and slots.max() < len(spilled))
    if len(keys) != len(counts) or int(counts.sum()) != in_records + len(slots) or not fits:
        raise ValueError(
            f"stored teacher logits: {len(keys)} keys and {len(counts)} counts that add up to {int(counts.sum())} do "
            f"not belong to {in_records} records and {len(slots)} more in {len(spilled)} slots"
        )
    for key, end, count in zip(keys, np.cumsum(counts), counts, strict=True):
        begin = int(end - count)
        inside = end <= in_records
        yield key.tobytes(), records[begin:end] if inside else spilled[slots[begin - in_records : end - in_records]]
