"""From what callers hold (lists, arrays, tensors, masks) to the arrays of a `StoredRow`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distillm_ext import _codec

from .settings import CompressionSettings
from .shard import StoredRow, spans_of

# Token ids; an int (everything from there on is a target), a bool mask or ascending places.
Tokens = Any
Targets = Any


def as_tokens(tokens: Tokens) -> np.ndarray:
    """[length] int32 from a list, array or tensor of token ids."""
    array = np.asarray(tokens.cpu() if hasattr(tokens, "cpu") else tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be one row of integers, got shape {list(array.shape)} of {array.dtype}")
    if array.size and not (0 <= array.min() and array.max() < 2**31):
        raise ValueError(f"tokens must lie in [0, 2**31), got {array.min()} to {array.max()}")
    return array.astype(np.int32)


def as_spans(targets: Targets, length: int) -> np.ndarray:
    """[2 n] int32: the runs of target tokens in a row of `length` tokens."""
    if isinstance(targets, (int, np.integer)) and not isinstance(targets, bool):
        places = np.arange(targets, length)
    else:
        array = np.asarray(targets.cpu() if hasattr(targets, "cpu") else targets)
        if array.ndim != 1 or (array.dtype == bool and len(array) != length):
            raise ValueError(
                f"targets must be one mask of {length} entries or one row of places, got {list(array.shape)}"
            )
        places = np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)
    if len(places) and not (places[0] >= 1 and places[-1] < length and (np.diff(places) > 0).all()):
        raise ValueError(
            f"targets must ascend within 1..{length - 1} (the first token has nothing before it), got {places[:8]}"
        )
    return spans_of(places)


def packed_records(settings: CompressionSettings, records: Any, positions: int) -> np.ndarray:
    """[positions, record_bytes] uint8 from `CompressedLogits` or packed bytes of that shape."""
    if hasattr(records, "logprobs"):
        check_compressed(settings, records)
        records = records.flatten().pack(settings.codec)
    array = np.ascontiguousarray(records.cpu().numpy() if hasattr(records, "cpu") else records)
    wanted = (positions, settings.record_bytes)
    if array.dtype != np.uint8 or array.shape != wanted:
        raise ValueError(
            f"records must be uint8 of shape {list(wanted)}, one for each of {positions} targets, got {array.dtype} of "
            f"shape {list(array.shape)}"
        )
    return array


def check_compressed(settings: CompressionSettings, compressed: Any) -> None:
    """Raise ValueError where compressed logits do not have the settings of the cache."""
    has = {
        "k": compressed.k,
        "vocab_size": compressed.vocab_size,
        "method": compressed.method,
        "temperatures": compressed.temperatures,
        "labels": compressed.label_logprob is not None,
    }
    wrong = [
        f"{name} {value!r}, not {getattr(settings, name)!r}"
        for name, value in has.items()
        if value != getattr(settings, name)
    ]
    if wrong:
        raise ValueError(f"records must have the settings of the cache, got {'; '.join(wrong)}")


def store_row(settings: CompressionSettings, tokens: Tokens, targets: Targets, records: Any) -> StoredRow:
    """The row as it goes to disk; records of method "sample" lose their padding."""
    ids = as_tokens(tokens)
    spans = as_spans(targets, len(ids))
    empty = np.empty(0, np.int64)
    row = StoredRow(ids, spans, np.empty(0, np.uint8), empty)
    packed = packed_records(settings, records, row.positions)
    if settings.method == "topk":
        return StoredRow(ids, spans, packed.reshape(-1), empty)
    return StoredRow(ids, spans, *_codec.trim_records(packed, *settings.record))


def restored_records(settings: CompressionSettings, row: StoredRow) -> np.ndarray:
    """[positions, record_bytes] uint8; a view of the row for method "topk"."""
    if settings.method == "topk":
        return row.records.reshape(row.positions, settings.record_bytes)
    return _codec.restore_records(row.records, row.offsets, *settings.record)


def sequences_of(tokens: Tokens | Sequence[Tokens]) -> list[Tokens]:
    """One row of tokens, or several, as a list of rows."""
    if hasattr(tokens, "ndim"):
        return [tokens] if tokens.ndim == 1 else list(tokens)
    rows = list(tokens)
    return [rows] if rows and isinstance(rows[0], (int, np.integer)) else rows
