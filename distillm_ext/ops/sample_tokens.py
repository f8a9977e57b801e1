"""Operator `sample_tokens`: typed call and fake. Sampling has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension  # noqa: F401  (loads the libraries)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    seed: int | Tensor,
    position: int | Tensor,
    repetition_penalty: float | Tensor = 1.0,
    previous_tokens: Tensor | None = None,
    banned: Tensor | None = None,
    bits: Tensor | None = None,
) -> Outputs:
    """Token, log-probability, filtered log-probability and validity of every row of logits [R, V].

    Parameters are numbers, or tensors [R] of float32 (top_k, seed, position: int64). `bits` [R] int64 takes the place
    of the random bits of (seed, position): with it tests put a draw where they want it.
    """
    named = (temperature, top_k, top_p, min_p, repetition_penalty, seed, position)
    rows = [value if isinstance(value, Tensor) else None for value in named]
    numbers = [0 if isinstance(value, Tensor) else value for value in named]
    return torch.ops.distillm_ext.sample_tokens(logits, *rows, previous_tokens, banned, bits, *numbers)


@torch.library.register_fake("distillm_ext::sample_tokens")
def _sample_tokens_fake(logits: Tensor, *_: object) -> Outputs:
    rows = (logits.shape[0],)
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.bool),
    )
