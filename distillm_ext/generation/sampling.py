"""Sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from softmax(logits / temperature).

    Attributes:
        temperature: softmax temperature, ≥ 0. 0 is greedy decoding.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches `top_p` (nucleus sampling, Holtzman et al.
            2020), taken after `top_k`; 1.0 keeps all.
        min_p: keep the tokens at least `min_p` times as probable as the most probable one; 0.0 keeps all.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"sampling.{name}: expected a number, got {value!r} ({type(value).__name__})")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"sampling.temperature: expected a number >= 0 (0 is greedy), got {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
            raise TypeError(f"sampling.top_k: expected an int, got {self.top_k!r} ({type(self.top_k).__name__})")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k: expected an int >= 0 (0 keeps every token), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: expected a number in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p: expected a number in [0, 1], got {self.min_p}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> SamplingParams:
        """Builds the parameters from a mapping such as the YAML block `sampling: {temperature: 0.7, top_p: 0.9}`."""
        legal = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(legal))
        if unknown:
            raise ValueError(f"sampling: unknown key {unknown[0]!r}; legal keys are {', '.join(legal)}")
        return cls(**values)  # type: ignore[arg-type]
