"""Token rows of different lengths as the arrays of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
