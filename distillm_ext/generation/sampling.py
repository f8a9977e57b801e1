"""Sampling parameters, the logit filters they stand for, and a draw that takes its randomness as an argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn from softmax(logits / temperature).

    Attributes:
        temperature: softmax temperature, ≥ 0. 0 is greedy decoding.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches `top_p` (nucleus sampling, Holtzman et al.
            2020), taken after `top_k`; 1.0 keeps all.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
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

    @classmethod
    def from_mapping(cls, values: Mapping[str, object]) -> SamplingParams:
        """Builds the parameters from a mapping such as the YAML block `sampling: {temperature: 0.7, top_p: 0.9}`."""
        legal = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(legal))
        if unknown:
            raise ValueError(f"sampling: unknown key {unknown[0]!r}; legal keys are {', '.join(legal)}")
        return cls(**values)  # type: ignore[arg-type]


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Tempers the logits and sets those that top-k and top-p exclude to −inf.

    Args:
        logits: [rows, V], any floating dtype.
        params: temperature must be > 0 (greedy decoding needs no filter).

    Returns:
        [rows, V] float32. At least one finite entry stays in every row that has one.
    """
    scores = logits.float() / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        threshold = scores.topk(params.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < threshold, float("-inf"))
    if params.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # The mass before the first token is exactly 0, so one token always stays.
        beyond = probabilities.cumsum(dim=-1) - probabilities >= params.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return scores


def sample_inverse_cdf(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution: the randomness is an argument.

    Args:
        scores: [rows, V] filtered logits (−inf has probability 0).
        uniforms: [rows] float64 in [0, 1), one independent draw per row.

    Returns:
        [rows] int64 token ids. A token of probability 0 is never returned.
    """
    # float64: a float32 running sum over 10⁵ entries loses the tail, and would return tokens of probability 0.
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniforms.to(cumulative.dtype).unsqueeze(-1) * cumulative[..., -1:]
    # right=True finds the first entry strictly above the target, which has a positive probability.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=scores.shape[-1] - 1)
