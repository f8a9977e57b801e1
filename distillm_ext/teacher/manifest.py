"""What a cache is: its settings, and the list of its shards with their hashes, as JSON that protects itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from distillm_ext.files import write_text

from .errors import CacheDamaged, CacheError, CacheMismatch
from .settings import CompressionSettings

FORMAT = "distillm-teacher-cache"
VERSION = 1
MANIFEST = "manifest.json"
_FINGERPRINTS = ("teacher", "tokenizer", "dataset")


@dataclass(frozen=True)
class CacheSpec:
    """Settings that every row of a cache shares.

    Attributes:
        compression: of the logits.
        teacher, tokenizer, dataset: fingerprints (`distillm_ext.teacher.fingerprint`), "" where unknown.
        details: anything else worth keeping, such as names; JSON values. The seed stands in `compression`.

    Raises:
        TypeError: a compression of another kind.
        ValueError: details with a seed.

    Example:
        >>> CacheSpec(CompressionSettings(vocab_size=151936, k=64), teacher=fingerprint_model(teacher))
    """

    compression: CompressionSettings
    teacher: str = ""
    tokenizer: str = ""
    dataset: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.compression, CompressionSettings):
            raise TypeError(f"compression: expected CompressionSettings, got {self.compression!r}")
        if "seed" in self.details:
            raise ValueError(f"details: the seed belongs to the compression, got {self.details['seed']!r} here")

    def to_json(self) -> dict[str, Any]:
        """As in a manifest, whose first version has all settings side by side and the seed among the details."""
        compression = asdict(self.compression)
        details = {**self.details, "seed": compression.pop("seed")}
        return {**compression, **{name: getattr(self, name) for name in _FINGERPRINTS}, "details": details}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CacheSpec:
        """Inverse of `to_json`; other entries are passed over."""
        details = dict(values["details"])
        named = {f.name: values[f.name] for f in fields(CompressionSettings) if f.name != "seed"}
        seed = details.pop("seed", 0)  # of any type: notes were free once
        compression = CompressionSettings(**named, seed=seed if type(seed) is int else 0)
        return cls(compression, **{name: values[name] for name in _FINGERPRINTS}, details=details)

    def check_equal(self, other: CacheSpec, what: str) -> None:
        """Raise `CacheMismatch` that lists every setting in which `other` differs; `details` may, and the seed where
        nothing is drawn."""
        mine, theirs = (spec.to_json() | {"seed": spec.compression.seed} for spec in (self, other))
        free = {"details"} if "sample" in (mine["method"], theirs["method"]) else {"details", "seed"}
        different = [
            f"{name}: {value!r} there, {theirs[name]!r} here"
            for name, value in mine.items()
            if name not in free and value != theirs[name]
        ]
        if different:
            raise CacheMismatch(f"{what} was made with other settings ({'; '.join(different)}); use another folder")

    def _made_for(self, name: str) -> str:
        dtype = self.details.get("dtype") if name == "teacher" else None
        return _short(getattr(self, name)) + (f" in {dtype}" if dtype else "")

    def check_fingerprints(self, path: Path, expected: dict[str, str | None]) -> None:
        """Raise `CacheMismatch` naming those of teacher, tokenizer and data set that differ; None is not compared."""
        different = [
            f"{name} (cache {self._made_for(name)}, here {_short(value)})"
            for name, value in expected.items()
            if value is not None and value != getattr(self, name)
        ]
        if different:
            raise CacheMismatch(
                f"the cache {path} was made for another {' and another '.join(different)}; capture again, or open it "
                "with what it was made for"
            )


def _short(fingerprint: str) -> str:
    return f"{fingerprint[:12]}…" if len(fingerprint) > 12 else fingerprint or "none"


@dataclass(frozen=True)
class ShardInfo:
    """A shard as written.

    Attributes:
        file: name in the folder of the cache.
        rows, positions, bytes: how many.
        sha256: of the whole file.
        structure: SHA-256 of the file without its `bulk` ranges, which the checksums of the rows protect.
        bulk: [start, stop) byte ranges, ascending.
    """

    file: str
    rows: int
    positions: int
    bytes: int
    sha256: str
    structure: str
    bulk: tuple[tuple[int, int], ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ShardInfo:
        return cls(**{**values, "bulk": tuple((int(a), int(b)) for a, b in values["bulk"])})


@dataclass(frozen=True)
class Manifest:
    """Settings and shards. A cache in progress has one such file per shard, a finished one `manifest.json`."""

    spec: CacheSpec
    shards: tuple[ShardInfo, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def positions(self) -> int:
        return sum(shard.positions for shard in self.shards)

    def write(self, path: Path) -> None:
        body = {
            "format": FORMAT,
            "version": VERSION,
            "record_bytes": self.spec.compression.record_bytes,
            "rows": self.rows,
            "positions": self.positions,
            **self.spec.to_json(),
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_text(path, json.dumps({**body, "checksum": manifest_checksum(body)}, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises `CacheDamaged` for anything that `write` did not write, `CacheError` for another version."""
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum", None)
        except (ValueError, AttributeError, TypeError) as error:
            raise CacheDamaged(f"{path} is damaged: {error}; capture again") from None
        if body.get("format") != FORMAT:
            raise CacheError(f"{path} is not the manifest of a cache of teacher logits (format {body.get('format')!r})")
        # Before the checksum, which another version may take in another way.
        if body.get("version") != VERSION:
            raise CacheError(
                f"{path} has format version {body.get('version')!r}, this distillm_ext reads version {VERSION}; "
                "capture again, or use the distillm_ext that made it"
            )
        if checksum != manifest_checksum(body):
            raise CacheDamaged(f"{path} is damaged: its checksum does not fit; capture again")
        return cls(CacheSpec.from_json(body), tuple(ShardInfo.from_json(shard) for shard in body["shards"]))


def manifest_checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
