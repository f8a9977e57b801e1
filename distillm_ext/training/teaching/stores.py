"""Where the teacher's compressed output waits for its sequence to come again: one store for the rows of the data, which
every process holds whole, and one for the sequences in this process's replay buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distillm_ext.data.sequences import TokenSequence
from distillm_ext.teacher.records import RecordStore

MIB = 2**20


class RecordSource(Protocol):
    """Records by sequence key: a cache on disk, or a store."""

    def get(self, key: bytes) -> np.ndarray | None:
        """[n, record bytes] uint8, or None where the key is unknown."""
        ...


class HostCopy:
    """A device tensor on its way to the host: nobody waits until it is read, usually a step later."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._copy = tensor.cpu()
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> np.ndarray:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.numpy()


class ReuseStores:
    """Records of data rows and of replayed sequences.

    A row of the data may meet another process in the next epoch, so what one process computes is given to all. That
    takes a message per step until every row has been seen, and none afterwards.

    Args:
        record_bytes: bytes per target.
        folder: where the stores' temporary files go.
        rank, world_size: of this process.
        num_rows: rows of the training set.
        gather: list of this process → the lists of all processes, one after the other.
    """

    def __init__(
        self,
        record_bytes: int,
        *,
        folder: Path,
        rank: int,
        world_size: int,
        num_rows: int,
        gather: Callable[[list[Any]], list[Any]],
    ) -> None:
        self.data = RecordStore(record_bytes, folder)
        self.replay = RecordStore(record_bytes, folder)
        self.rank = rank
        self.world_size = world_size
        self.num_rows = num_rows
        self.gather = gather
        self._deferred: list[tuple[list[tuple[bytes, int]], HostCopy]] = []
        self._source = ""
        self._rows: list[int] = []
        self._seen: dict[str, set[int]] = {}

    def get(self, key: bytes) -> np.ndarray | None:
        """Records of a sequence, wherever they are."""
        records = self.data.get(key)
        return records if records is not None else self.replay.get(key)

    # ---- data rows

    def begin_step(self, source: str, rows: Sequence[int]) -> None:
        """Names where the step's rows come from, and the rows if they come again."""
        self._source, self._rows = source, list(rows)

    def defer(self, sequences: list[tuple[bytes, int]], records: Tensor) -> None:
        """Keeps [Σ targets, record_bytes] of (key, targets) until `settle`: reading them now would wait."""
        self._deferred.append((sequences, HostCopy(records)))

    def settle(self) -> None:
        """Stores what was deferred, here and on all processes. Every process calls it equally often."""
        computed: list[tuple[bytes, np.ndarray]] = []
        for sequences, copy in self._deferred:
            ends = np.cumsum([count for _, count in sequences])[:-1]
            parts = np.split(copy.numpy(), ends)
            computed += [(key, part) for (key, _), part in zip(sequences, parts, strict=True)]
        rows, source = self._rows, self._source
        self._rows, self._source, self._deferred = [], "", []
        if self.world_size > 1 and source:
            seen = self._seen.setdefault(source, set())
            if len(seen) < self.num_rows:
                for others, theirs in self.gather([(rows, computed)]):
                    seen.update(others)
                    for key, records in theirs:
                        self.data.put(key, records)
                return
        for key, records in computed:
            self.data.put(key, records)

    # ---- replayed sequences

    def retain_replayed(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Drops the records of all other sequences; returns those that have none yet, each once."""
        by_key = {sequence.key: sequence for sequence in sequences}
        self.replay.retain(by_key.keys())
        return [sequence for key, sequence in by_key.items() if key not in self.replay]

    # ---- sizes and checkpoints

    def sizes(self) -> dict[str, float]:
        """MiB of records."""
        return {"reuse_disk_mib": (self.data.nbytes + self.replay.nbytes) / MIB}

    def pack(self) -> dict[str, Tensor]:
        """This process's part of a checkpoint; the rows of the data, equal on all, are the first one's."""
        parts = {"teacher_replay": self.replay}
        if self.rank == 0:
            parts["teacher_data"] = self.data
        return {f"{prefix}.{name}": value for prefix, store in parts.items() for name, value in store.pack().items()}

    def unpack(self, saved: Sequence[Mapping[str, Tensor]], replayed: Sequence[bytes]) -> None:
        """Restores `pack` from those of all processes; `replayed`: keys of the sequences in this one's buffer."""
        wanted = set(replayed)
        for tensors in saved:
            for prefix, store, only in (("teacher_data.", self.data, None), ("teacher_replay.", self.replay, wanted)):
                part = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                if part:
                    store.unpack(part, only=only)
