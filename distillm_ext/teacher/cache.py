"""`TeacherCache`: reads the compressed logits of a teacher that ran once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillm_ext.paths import expand_path

from .errors import CacheError, CacheMiss
from .fingerprint import fingerprint_dataset, fingerprint_model, fingerprint_tokenizer
from .index import RowIndex
from .manifest import MANIFEST, CacheSpec, Manifest
from .shard import Shard, StoredRow, row_key, token_key
from .stored_rows import Targets, Tokens, as_spans, as_tokens, restored_records, sequences_of

if TYPE_CHECKING:
    from distillm_ext.compressed_logits import CompressedLogits


@dataclass(frozen=True)
class CacheRow:
    """One example.

    Attributes:
        tokens: [length] int32.
        targets: [positions] int64, places of the target tokens; record j predicts tokens[targets[j]].
        packed: [positions, record_bytes] uint8.
    """

    tokens: np.ndarray
    targets: np.ndarray
    packed: np.ndarray


class TeacherCache:
    """Compressed logits on disk, found by the tokens of the sequence whatever their order, batch or rank.

    Files are memory-mapped; a lookup is one seek. The object can be pickled: it opens the folder again where it
    arrives, as in data-loader workers. Reading packed bytes does not import torch.

    Example:
        >>> cache = TeacherCache.open("cache", teacher=fingerprint, tokenizer=tokenizer)
        >>> compressed = cache.lookup([row["input_ids"] for row in batch])  # positions of all rows, end to end
    """

    def __init__(self, path: Path, manifest: Manifest, *, full: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self._shards = [Shard(path / info.file, info, full=full) for info in manifest.shards]
        self._index = RowIndex(shard.keys for shard in self._shards)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher: Any = None,
        tokenizer: Any = None,
        dataset: Any = None,
        verify: str = "structure",
    ) -> TeacherCache:
        """Open a finished cache and check what it was made for.

        Args:
            path: folder written by `CacheWriter`.
            teacher: the model, or its fingerprint; None is not compared, as below.
            tokenizer: the tokenizer, or its fingerprint.
            dataset: rows of tokens or of text, or their fingerprint.
            verify: "structure" checks the structure of the files now and every row when it is read; "full" hashes whole
                files now.

        Raises:
            CacheMismatch: made for another teacher, tokenizer or data set; the message says which differ.
            CacheDamaged: a flipped byte, a truncated or missing shard.
            CacheError: no finished cache there, another format version.
        """
        if verify not in ("structure", "full"):
            raise ValueError(f"verify must be 'structure' or 'full', got {verify!r}")
        folder = Path(expand_path(path, "path"))
        manifest = Manifest.read(_manifest_file(folder))
        expected = {
            "teacher": _fingerprint(teacher, fingerprint_model),
            "tokenizer": _fingerprint(tokenizer, fingerprint_tokenizer),
            "dataset": _fingerprint(dataset, fingerprint_dataset),
        }
        manifest.spec.check_fingerprints(folder, expected)
        return cls(folder, manifest, full=verify == "full")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.manifest)

    @property
    def spec(self) -> CacheSpec:
        return self.manifest.spec

    def __len__(self) -> int:
        """Distinct examples."""
        return len(self._index)

    def __iter__(self) -> Iterator[CacheRow]:
        """All examples in the order of storage."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> CacheRow:
        """The example of this number in the order of storage."""
        if not 0 <= number < len(self):
            raise IndexError(f"the cache {self.path} has {len(self)} rows, got index {number}")
        shard, row = self._index.place(number)
        return self._read(self._shards[shard].row(row))

    def __contains__(self, tokens: Tokens) -> bool:
        return next(self._index.find(token_key(as_tokens(tokens))), None) is not None

    def row(self, tokens: Tokens, targets: Targets | None = None) -> CacheRow:
        """The example with these tokens.

        Args:
            tokens: the token ids, as captured.
            targets: its targets (first place, mask or places), compared where given. None: those stored.

        Raises:
            CacheMiss: no such row; the message shows its first tokens.
            CacheDamaged: the row is not what was written.
        """
        ids = as_tokens(tokens)
        spans = None if targets is None else as_spans(targets, len(ids))
        key = token_key(ids) if spans is None else row_key(ids, spans)
        for shard, row in self._index.find(key):
            stored = self._shards[shard].row(row)
            if np.array_equal(stored.tokens, ids) and (spans is None or np.array_equal(stored.spans, spans)):
                return self._read(stored)
        known = spans is not None and ids in self
        reason = "has these tokens, but with other targets" if known else "has no row"
        raise CacheMiss(
            f"the cache {self.path} {reason}: a sequence of {len(ids)} tokens that starts with {ids[:8].tolist()}; "
            "capture the data set that is trained on"
        )

    def has(self, key: bytes) -> bool:
        """Whether there is an example with this key (`distillm_ext.teacher.keys.sequence_key`)."""
        return next(self._index.find(key), None) is not None

    def get(self, key: bytes) -> np.ndarray | None:
        """The packed records [positions, record_bytes] of the example with this key, None where there is none."""
        for shard, row in self._index.find(key):
            return self._read(self._shards[shard].row(row)).packed
        return None

    def lookup(
        self, tokens: Tokens | Sequence[Tokens], targets: Sequence[Targets] | None = None, *, device: Any = "cpu"
    ) -> CompressedLogits:
        """Compressed logits [N, k] of the target positions of one or several sequences, end to end.

        Args:
            tokens: the token ids of one sequence, or a batch of them (without the batch's padding).
            targets: per sequence, as in `row`.
            device: where to unpack; the packed bytes are what is sent there.
        """
        return self.unpack(self.packed(tokens, targets), device=device)

    def packed(self, tokens: Tokens | Sequence[Tokens], targets: Sequence[Targets] | None = None) -> np.ndarray:
        """The packed records [N, record_bytes] uint8 of `lookup`."""
        sequences = sequences_of(tokens)
        wanted = [None] * len(sequences) if targets is None else list(targets)
        if len(wanted) != len(sequences):
            raise ValueError(f"targets must have one entry per sequence ({len(sequences)}), got {len(wanted)}")
        rows = [self.row(ids, places).packed for ids, places in zip(sequences, wanted, strict=True)]
        return np.concatenate([*rows, np.empty((0, self.spec.compression.record_bytes), np.uint8)])

    def unpack(self, packed: np.ndarray, *, device: Any = "cpu") -> CompressedLogits:
        """Packed records [..., record_bytes] of this cache as `CompressedLogits` on a device."""
        import torch

        records = torch.from_numpy(packed if packed.flags.writeable else packed.copy())
        return self.spec.compression.unpack(records.to(device))

    def _read(self, row: StoredRow) -> CacheRow:
        return CacheRow(row.tokens, row.targets, restored_records(self.spec.compression, row))


def _reopen(path: str, manifest: Manifest) -> TeacherCache:
    return TeacherCache(Path(path), manifest)


def _fingerprint(value: Any, compute: Any) -> str | None:
    return value if value is None or isinstance(value, str) else compute(value)


def _manifest_file(folder: Path) -> Path:
    file = folder / MANIFEST
    if file.exists():
        return file
    if not folder.is_dir():
        raise CacheError(f"there is no cache of teacher logits at {folder}")
    if any(folder.glob("shard-*")):
        raise CacheError(f"the capture into {folder} was not finished; run it again, it goes on where it stopped")
    raise CacheError(f"{folder} holds no {MANIFEST}, so it is no cache of teacher logits")
