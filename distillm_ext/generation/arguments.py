"""Checks of `generate`'s arguments, and one value per row made of those that may be one for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillm_ext.generation.sampling import SamplingParams

_DEFAULT_NEW_TOKENS = 256


def check_tokens(input_ids: Any, attention_mask: Any) -> None:
    """Kinds and shapes of the two tensors."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: expected a tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids: expected int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected [rows, tokens], got shape {list(input_ids.shape)}")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor or None, got {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )


def left_aligned_lengths(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """→ prompts [rows, S] that end in the last column, whatever side the padding was on; their lengths."""
    if attention_mask is None:
        return input_ids.long(), [input_ids.shape[1]] * len(input_ids)
    present = attention_mask.to(input_ids.device) != 0
    order = present.long().argsort(dim=1, stable=True)
    return input_ids.long().gather(1, order), present.sum(dim=1).tolist()


def check_rows(lengths: Sequence[int]) -> None:
    """Every prompt holds a token."""
    for row, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"prompts[{row}]: expected at least one token, got none; begin it with a BOS token")


def row_limits(value: Any, rows: int, defaults: Any) -> list[int]:
    """Most new tokens of each row."""
    if value is None:
        value = getattr(defaults, "max_new_tokens", None) or _DEFAULT_NEW_TOKENS
    if isinstance(value, Tensor):
        value = value.tolist()
    listed = isinstance(value, (Sequence, np.ndarray))
    limits = list(value) if listed else [value] * rows
    if len(limits) != rows:
        raise ValueError(f"max_new_tokens: expected an int or one per row ({rows}), got {len(limits)}")
    for limit in limits if listed else [value]:
        if isinstance(limit, bool) or not isinstance(limit, (int, np.integer)):
            raise TypeError(f"max_new_tokens: expected int, got {limit!r} ({type(limit).__name__})")
        if limit < 1:
            raise ValueError(f"max_new_tokens: expected an int >= 1, got {limit}")
    return [int(limit) for limit in limits]


def row_ends(value: Any, rows: int, defaults: Any) -> Tensor:
    """[rows, e] int64, the tokens that end each row, filled up with −1."""
    if value is None:
        value = getattr(defaults, "eos_token_id", None)
        value = [] if value is None else value
    if isinstance(value, Tensor):
        value = value.tolist()
    listed: list[Any] = list(value) if isinstance(value, (Sequence, np.ndarray)) else [value]
    nested = any(not isinstance(entry, (int, np.integer)) for entry in listed)
    per_row = [list(entry) for entry in listed] if nested else [listed] * rows
    if len(per_row) != rows:
        raise ValueError(f"eos_token_ids: expected token ids, or a sequence of them per row ({rows}), got {value!r}")
    width = max((len(entry) for entry in per_row), default=0)
    table = torch.full((rows, width), -1, dtype=torch.int64)
    for row, entry in enumerate(per_row):
        table[row, : len(entry)] = torch.tensor(entry, dtype=torch.int64)
    return table


def row_sampling(params: Any, rows: int) -> dict[str, Any]:
    """Arguments of `sample_tokens`: numbers where they are one for all rows, else [rows] tensors."""
    names = [field.name for field in fields(SamplingParams)]
    if isinstance(params, SamplingParams):
        return {name: getattr(params, name) for name in names}
    listed = list(params) if isinstance(params, Sequence) else [params]
    for entry in listed:
        if not isinstance(entry, SamplingParams):
            raise TypeError(f"params: expected SamplingParams, or one per row, got {type(entry).__name__}")
    if len(listed) != rows:
        raise ValueError(f"params: expected SamplingParams, or one per row ({rows}), got {len(listed)}")
    return {
        name: torch.tensor(
            [getattr(entry, name) for entry in listed], dtype=torch.int64 if name == "top_k" else torch.float32
        )
        for name in names
    }


def row_seeds(seeds: Any, rows: int, sampling: dict[str, Any]) -> Tensor:
    """[rows] int64 seeds, taken modulo 2⁶⁴."""
    if seeds is None:
        hottest = sampling["temperature"]
        if rows and (hottest.max() if isinstance(hottest, Tensor) else hottest) > 0:
            raise ValueError("seeds: sampling at temperature > 0 needs one seed per prompt, got None")
        return torch.zeros(rows, dtype=torch.int64)
    if isinstance(seeds, Tensor):
        seeds = seeds.tolist()
    if len(seeds) != rows:
        raise ValueError(f"seeds: expected one per prompt ({rows}), got {len(seeds)}")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seeds: expected int, got {seed!r} ({type(seed).__name__})")
    words = np.array([int(seed) & ((1 << 64) - 1) for seed in seeds], dtype=np.uint64)
    return torch.from_numpy(words.view(np.int64))
