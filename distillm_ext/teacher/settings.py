"""How teacher logits are compressed: what a cache, the reuse store and the losses that read them must agree on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distillm_ext.containers import CompressedLogits
from distillm_ext.packing import record_bytes

from .manifest import CacheSpec


@dataclass(frozen=True)
class CompressionSettings:
    """The parameters of one compression.

    Attributes:
        vocab_size: entries of the teacher's row that are looked at.
        k: entries kept, or draws.
        method: "topk" or "sample".
        codec: "q4", "q6", "q8", "fp16" or "exact".
        temperatures: those whose normaliser and tail mass are kept.
        labels: whether the log-probability of the target is kept.
        seed: of method "sample".
    """

    vocab_size: int
    k: int = 64
    method: str = "topk"
    codec: str = "q8"
    temperatures: tuple[float, ...] = (1.0,)
    labels: bool = False
    seed: int = 0

    @property
    def record_bytes(self) -> int:
        """Bytes of one position."""
        return record_bytes(
            self.codec, k=self.k, vocab_size=self.vocab_size, temperatures=self.temperatures, labels=self.labels,
            method=self.method,
        )  # fmt: skip

    @classmethod
    def of_cache(cls, spec: CacheSpec) -> CompressionSettings:
        """Those that a cache on disk was made with."""
        return cls(
            spec.vocab_size, spec.k, spec.method, spec.codec, spec.temperatures, spec.labels,
            int(spec.details.get("seed", 0)),
        )  # fmt: skip

    def pack(self, compressed: CompressedLogits) -> Tensor:
        """[R, record_bytes] uint8."""
        return compressed.pack(self.codec)

    def unpack(self, records: Tensor) -> CompressedLogits:
        """[R, record_bytes] uint8 → [R] positions."""
        return CompressedLogits.unpack(
            records, codec=self.codec, k=self.k, vocab_size=self.vocab_size, temperatures=self.temperatures,
            method=self.method,
        )  # fmt: skip
