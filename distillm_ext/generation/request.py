"""What is to be generated, and the draw of the next tokens that both ways of decoding share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillm_ext.containers import SampledTokens
from distillm_ext.sampling import sample_tokens


@dataclass(frozen=True)
class Request:
    """What to generate, one entry per row; rows are ordered by falling prompt length.

    Attributes:
        prompts: [rows, longest] int64, every prompt ends in the last column.
        lengths: prompt lengths, on the host.
        limits: most new tokens per row, [rows] int64.
        ends: [rows, e] int64, tokens that end a row, filled up with −1.
        seeds: [rows] int64.
        sampling: arguments of `sample_tokens`: numbers, or [rows] tensors.
        vocab_size: only ids below it are generated, or None.
    """

    prompts: Tensor
    lengths: list[int]
    limits: Tensor
    ends: Tensor
    seeds: Tensor
    sampling: dict[str, Any]
    vocab_size: int | None = None

    def draw(self, logits: Tensor, rows: Tensor, age: Tensor) -> tuple[SampledTokens, Tensor, Tensor]:
        """Draws token number `age` of each of `rows`.

        Args:
            logits: [n, V] of the model.
            rows: [n] int64, rows of the request.
            age: [n] int64, tokens that each row has.

        Returns:
            The tokens; whether each ends its row; whether the row goes on behind it ([n] bool).
        """
        if self.vocab_size is not None:
            logits = logits[:, : self.vocab_size]
        if logits.dtype == torch.float64:
            logits = logits.float()  # the sampler's masses have fewer bits than either
        sampling = {name: v[rows] if isinstance(v, Tensor) else v for name, v in self.sampling.items()}
        drawn = sample_tokens(logits, **sampling, seed=self.seeds[rows], position=age)
        ended = (drawn.tokens.unsqueeze(1) == self.ends[rows]).any(dim=1)
        # A row without a valid distribution stops here: what it would read next has no meaning.
        return drawn, ended, ~ended & drawn.valid & (age + 1 < self.limits[rows])
