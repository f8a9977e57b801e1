"""Batches of token rows. Positions of the loss are worked out here, on the host, so that no later step has to ask the
accelerator how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distillm_ext.teacher.keys import sequence_key

IGNORE_INDEX = -100


def pad_rows(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int, *, multiple_of: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pads token rows on the right.

    Args:
        rows: B mappings with `input_ids` and `loss_mask` (1 where the token is a target), of at most S tokens.
        pad_token_id: fills `input_ids`; marked by the attention mask, so it may equal any other token.
        multiple_of: rounds S up.

    Returns:
        input_ids, attention_mask, labels, each [B, S] int64. Labels are the token where it is a target, else −100, and
        **not shifted** (Hugging Face's convention).

    Raises:
        ValueError: a mask of another length than its tokens; names the row.

    Example:
        >>> rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8, 9], "loss_mask": [0, 1]}]
        >>> pad_rows(rows, 0)[2].tolist()
        [[-100, 6, 7], [-100, 9, -100]]
    """
    length = -(-max(len(row["input_ids"]) for row in rows) // multiple_of) * multiple_of
    input_ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for index, row in enumerate(rows):
        tokens, mask = np.asarray(row["input_ids"], dtype=np.int64), np.asarray(row["loss_mask"], dtype=bool)
        if len(tokens) != len(mask):
            raise ValueError(
                f"loss_mask: expected {len(tokens)} entries, one per token of input_ids, got {len(mask)} "
                f"(row {row.get('row', index)})"
            )
        input_ids[index, : len(tokens)] = tokens
        attention_mask[index, : len(tokens)] = 1
        labels[index, : len(tokens)] = np.where(mask, tokens, IGNORE_INDEX)
    return input_ids, attention_mask, labels


@dataclass(frozen=True)
class DistillationCollator:
    """Pads token rows on the right and finds the positions whose logits the loss needs.

    A row is a mapping with `input_ids`, `loss_mask` (1 where the token is a target), `prompt_length` and `row`.

    Args:
        pad_token_id: fills `input_ids`; marked by the attention mask, so it may equal any other token.
        pad_to_multiple_of: rounds the length up, for hardware that likes multiples.

    Returns (from a call, B rows of at most S tokens, R targets):
        input_ids, attention_mask: [B, S] int64.
        labels: [B, S] int64, the token where it is a target, else −100. **Not shifted** (Hugging Face's convention).
        positions: [R] int64, flat index b·S + t of the position whose logits predict target t + 1 of row b: the first
            response token is predicted at the last prompt token.
        targets: [R] int64, the tokens predicted there.
        prompt_length, row: [B] int64.
        num_tokens: tokens that are not padding (int).
        keys, row_targets, row_numbers: lists of B, which stay on the host: what names the row and its targets
            (`sequence_key`), how many targets it has, and `row` again.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        input_ids, attention_mask, labels = pad_rows(features, self.pad_token_id, multiple_of=self.pad_to_multiple_of)
        batch: dict[str, Any] = dict(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        batch["positions"], batch["targets"] = target_positions(labels)
        for name in ("prompt_length", "row"):
            batch[name] = np.array([feature[name] for feature in features], dtype=np.int64)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        rows = zip(input_ids, labels != IGNORE_INDEX, attention_mask.sum(axis=1), strict=True)
        return {
            **tensors,
            "num_tokens": int(attention_mask.sum()),
            "keys": [sequence_key(ids[:length], mask[:length]) for ids, mask, length in rows],
            "row_targets": (labels[:, 1:] != IGNORE_INDEX).sum(axis=1).tolist(),
            "row_numbers": batch["row"].tolist(),
        }


def target_positions(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions whose logits are needed, and the tokens they predict.

    Args:
        labels: [B, S], −100 where there is no target. Column 0 has no predecessor and is never a target.

    Returns:
        positions [R], targets [R]: the logits at flat position b·S + t predict labels[b, t + 1].
    """
    rows, columns = np.nonzero(labels[:, 1:] != IGNORE_INDEX)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]


def move_batch(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Sends the tensors of a batch to a device; other values stay."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
