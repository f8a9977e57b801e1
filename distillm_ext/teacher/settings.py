"""How teacher logits are compressed: what a cache, the reuse store and the losses that read them must agree on."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distillm_ext import _codec

if TYPE_CHECKING:
    from torch import Tensor

    from distillm_ext.compressed_logits import CompressedLogits


@dataclass(frozen=True)
class CompressionSettings:
    """The parameters of one compression. Importing it needs no torch.

    Attributes:
        vocab_size: entries of the teacher's row that are looked at.
        k: entries kept, or draws; at most `distillm_ext._codec.MAX_K`.
        method: "topk" or "sample".
        codec: "q4", "q6", "q8", "fp16" or "exact".
        temperatures: those whose normaliser and tail mass are kept.
        labels: whether the log-probability of the target is kept.
        seed: of method "sample".

    Raises:
        TypeError: a field of another type.
        ValueError: settings that no record can have; the message names the field.

    Example:
        >>> CompressionSettings(vocab_size=151936, k=64).record_bytes
        176
    """

    vocab_size: int
    k: int = 64
    method: str = "topk"
    codec: str = "q8"
    temperatures: tuple[float, ...] = (1.0,)
    labels: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        for name in ("vocab_size", "k", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            object.__setattr__(self, name, operator.index(value))
        if not isinstance(self.labels, bool):
            raise TypeError(f"labels must be True or False, got {self.labels!r}")
        if self.method not in ("topk", "sample"):
            raise ValueError(f"method must be 'topk' or 'sample', got {self.method!r}")
        _ = self.record_bytes  # refuses the others

    @property
    def record(self) -> tuple[str, int, int, tuple[float, ...], bool, bool]:
        """codec, k, vocab_size, temperatures, has_labels, has_counts: what `_codec` asks for."""
        return (self.codec, self.k, self.vocab_size, self.temperatures, self.labels, self.method == "sample")

    @property
    def record_bytes(self) -> int:
        """Bytes of one position."""
        return _codec.record_bytes(*self.record)

    def pack(self, compressed: CompressedLogits) -> Tensor:
        """[R, record_bytes] uint8."""
        return compressed.pack(self.codec)

    def unpack(self, records: Tensor) -> CompressedLogits:
        """[..., record_bytes] uint8 → [...] positions."""
        from distillm_ext.compressed_logits import CompressedLogits

        return CompressedLogits.unpack(
            records, codec=self.codec, k=self.k, vocab_size=self.vocab_size, temperatures=self.temperatures,
            method=self.method,
        )  # fmt: skip
