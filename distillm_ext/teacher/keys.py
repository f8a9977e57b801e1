"""What names a sequence: a hash of its tokens and targets, so that order, batch and process do not matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .shard import row_key
from .stored_rows import as_spans, as_tokens


def sequence_key(input_ids: Sequence[int] | np.ndarray, loss_mask: Sequence[int] | np.ndarray) -> bytes:
    """The key under which a cache on disk has the sequence too.

    Args:
        input_ids: [length] token ids.
        loss_mask: [length], 1 where the token is a target; the first token never is one.
    """
    tokens, mask = as_tokens(input_ids), np.array(loss_mask, dtype=bool)
    mask[:1] = False
    return row_key(tokens, as_spans(mask, len(tokens)))


def draw_positions(keys: Sequence[bytes], counts: Sequence[int]) -> np.ndarray:
    """[sum of counts] int64: which random number each target of each sequence gets.

    A function of the sequence and of the target's index in it: a sequence draws alike wherever it is compressed.
    """
    starts = [int.from_bytes(key[:8], "little") >> 2 for key in keys]
    pieces = [start + np.arange(count, dtype=np.int64) for start, count in zip(starts, counts, strict=True)]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])
