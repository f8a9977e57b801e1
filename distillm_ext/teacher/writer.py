"""`CacheWriter`: fills a cache shard by shard; what was written survives a kill at any moment.

A shard is written to a temporary name, announced by a small manifest of its own (`shard-*.json`), synced and renamed.
`finish` joins those into `manifest.json`. A restart removes what was cut off and skips the rows that are there.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

from distillm_ext.files import move_into_place
from distillm_ext.paths import expand_path

from .errors import CacheDamaged, CacheError
from .manifest import MANIFEST, CacheSpec, Manifest, ShardInfo
from .shard import Shard, StoredRow, row_key, write_shard
from .stored_rows import Targets, Tokens, as_spans, as_tokens, store_row

_NAME = re.compile(r"shard-(\d{5})-(\d{6})\.(arrow|json)")


class CacheWriter:
    """Writes rows of one rank into a cache folder, new or begun earlier.

    Args:
        path: folder, made if it is not there. A folder with other settings is refused.
        spec: what is written.
        rank: of this process; each has shards of its own.
        shard_bytes: size of a shard; what a kill can lose at most is recomputed.

    Raises:
        CacheMismatch: the folder was begun with other settings; the message lists them.
        CacheError: another process writes as this rank.

    Example:
        >>> with CacheWriter("cache", spec) as writer:
        ...     for tokens, response_start, compressed in rows:
        ...         if not writer.has(tokens, response_start):
        ...             writer.add(tokens, response_start, compressed)
        >>> finish_cache("cache", spec)  # once, by one rank, after all are done
    """

    def __init__(self, path: str | Path, spec: CacheSpec, *, rank: int = 0, shard_bytes: int = 64 << 20) -> None:
        if not 0 <= rank < 100_000:
            raise ValueError(f"rank must lie in 0..99999, got {rank}")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
        self.path, self.spec, self.rank, self.shard_bytes = Path(expand_path(path, "path")), spec, rank, shard_bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._pending: list[StoredRow] = []
        self._pending_bytes = 0
        self._lock = _locked(self.path / f"rank-{rank:05d}.lock", rank)
        try:
            self._resume()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.flush()
        self.close()

    def __len__(self) -> int:
        """Rows in the folder when it was opened, of all ranks, and those added since."""
        return len(self._keys)

    def has(self, tokens: Tokens, targets: Targets) -> bool:
        """Whether this row is there already, from any rank before this writer was opened, or from this one."""
        ids = as_tokens(tokens)
        return row_key(ids, as_spans(targets, len(ids))) in self._keys

    def add(self, tokens: Tokens, targets: Targets, records: Any) -> bool:
        """Add one example; False, and nothing done, where it is there already.

        Args:
            tokens: [length] token ids.
            targets: place of the first target (all later tokens are targets), a bool mask of all tokens, or ascending
                places. Token 0 cannot be one.
            records: one position per target, the one whose logits predict it: `CompressedLogits` or packed bytes.

        Raises:
            ValueError: tokens, targets or records that do not fit each other or the settings.
        """
        row = store_row(self.spec.compression, tokens, targets, records)
        key = row.key()
        if key in self._keys:
            return False
        self._keys.add(key)
        self._pending.append(row)
        self._pending_bytes += row.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()
        return True

    def flush(self) -> None:
        """Write the rows added since the last shard as a shard."""
        if not self._pending:
            return
        name = f"shard-{self.rank:05d}-{self._next:06d}.arrow"
        temporary = self.path / f"{name}.tmp"
        info = write_shard(temporary, name, self._pending)
        Manifest(self.spec, (info,)).write((self.path / name).with_suffix(".json"))
        move_into_place(temporary, self.path / name)
        self._next += 1
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Let go of the folder; rows that were not flushed are dropped."""
        self._pending, self._pending_bytes = [], 0
        os.close(self._lock)

    def _resume(self) -> None:
        """Finds the rows that are there, and the number of the next shard."""
        self._clean()
        shards = collect_shards(self.path, self.spec)
        self._keys = {bytes(key) for info in shards for key in Shard(self.path / info.file, info).keys}
        named = [match for info in shards if (match := _NAME.fullmatch(info.file))]
        self._next = max((int(match[2]) + 1 for match in named if int(match[1]) == self.rank), default=0)

    def _clean(self) -> None:
        """Removes what a kill cut off: temporary files, and announcements of shards that never got their name."""
        prefix = f"shard-{self.rank:05d}-"
        for file in self.path.glob(f"{prefix}*.tmp"):
            file.unlink()
        for file in self.path.glob(f"{prefix}*.json"):
            if not file.with_suffix(".arrow").exists():
                file.unlink()


def _locked(file: Path, rank: int) -> int:
    """An open handle whose lock the system drops with the process, however that ends."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise CacheError(f"another process is writing to {file.parent} as rank {rank}") from None
    return handle


def collect_shards(path: Path, spec: CacheSpec | None = None) -> list[ShardInfo]:
    """Every shard in the folder by its name, from `manifest.json` and the shards' own manifests.

    Raises:
        CacheMismatch: they were made with settings other than `spec`, or (None) than each other.
        CacheDamaged: a shard that no manifest knows.
    """
    found: dict[str, ShardInfo] = {}
    for file in [path / MANIFEST, *sorted(path.glob("shard-*.json"))]:
        # An announcement without its shard belongs to a rank that is writing it now, or was killed there.
        if not file.exists() or (file.name != MANIFEST and not file.with_suffix(".arrow").exists()):
            continue
        manifest = Manifest.read(file)
        spec = spec or manifest.spec
        manifest.spec.check_equal(spec, str(file))
        found.update((info.file, info) for info in manifest.shards)
    unknown = sorted({file.name for file in path.glob("shard-*.arrow")} - set(found))
    if unknown:
        raise CacheDamaged(f"{path / unknown[0]} has no manifest; remove it, its rows are then captured again")
    return [found[name] for name in sorted(found)]


def finish_cache(path: str | Path, spec: CacheSpec) -> Manifest:
    """Join the shards of all ranks into `manifest.json`. Call once, when every rank has flushed.

    Raises:
        CacheMismatch: ranks wrote with different settings.
        CacheDamaged: a shard is not there as written.
    """
    folder = Path(expand_path(path, "path"))
    shards = collect_shards(folder, spec)
    for info in shards:
        Shard(folder / info.file, info)
    manifest = Manifest(spec, tuple(shards))
    manifest.write(folder / MANIFEST)
    for pattern in ("shard-*.json", "rank-*.lock"):
        for file in folder.glob(pattern):
            file.unlink()
    return manifest
