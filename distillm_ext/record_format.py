"""The format of packed records: which settings there are, how many bytes a position takes, fields to bytes and back.

`distillm_ext.packing` says what each codec keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import pack_logits as ops
from .ops.extension import require_backend

CODECS = ("q4", "q6", "q8", "fp16", "exact")
METHODS = ("topk", "sample")
# The tensors of a row, in the order in which the operator takes and returns them.
FIELDS = ("ids", "logprobs", "log_norm", "tail_logprob", "label_logprob", "valid", "counts")


def checked_codec(codec: str) -> str:
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    return codec


def _checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    if isinstance(temperatures, (str, Tensor)) or not isinstance(temperatures, Sequence):
        raise TypeError(f"temperatures must be a sequence of numbers, got {type(temperatures).__name__}")
    return tuple(float(t) for t in temperatures)


def record_bytes(
    codec: str,
    *,
    k: int,
    vocab_size: int,
    temperatures: Sequence[float] = (1.0,),
    labels: bool = True,
    method: str = "topk",
) -> int:
    """Bytes of one packed position.

    Raises:
        ValueError: unknown codec or method, k outside of 1..4096, vocab_size outside of 1..2^30, bad temperatures.

    Example:
        >>> record_bytes("q8", k=64, vocab_size=151936)
        176
    """
    if method not in METHODS:
        raise ValueError(f"method must be 'topk' or 'sample', got {method!r}")
    temperatures = _checked_temperatures(temperatures)
    return ops.record_bytes(checked_codec(codec), k, vocab_size, temperatures, labels, method == "sample")


def pack_fields(fields: dict[str, Any], codec: str, vocab_size: int, temperatures: tuple[float, ...]) -> Tensor:
    """[R, bytes] uint8 of the tensors `FIELDS` of R positions.

    Raises:
        TypeError: "exact" for float64 log-probabilities, which it cannot hold.
        ValueError: an unknown codec, or settings that no record can have.
    """
    ids, logprobs = fields["ids"], fields["logprobs"]
    if checked_codec(codec) == "exact" and logprobs.dtype == torch.float64:
        raise TypeError("codec 'exact' stores float32, got float64 log-probabilities; convert them or use 'fp16'")
    labels, counted = fields["label_logprob"] is not None, fields["counts"] is not None
    ops.record_bytes(codec, ids.shape[-1], vocab_size, temperatures, labels, counted)  # refuses settings
    values: dict[str, Any] = {
        name: x.float() if x is not None and x.dtype.is_floating_point else x for name, x in fields.items()
    }
    return ops.pack_logits(**values, vocab_size=vocab_size, temperatures=temperatures, codec=codec)


def unpack_fields(
    packed: Tensor, codec: str, k: int, vocab_size: int, temperatures: Sequence[float], method: str
) -> dict[str, Any]:
    """`FIELDS` of the R positions of [..., bytes], `temperatures` and `vocab_size`; see `distillm_ext.packing.unpack`.

    Raises:
        TypeError: packed is not a uint8 tensor.
        ValueError: unknown codec or method, or a width that does not fit the settings.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        got = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"packed must be a tensor of dtype torch.uint8, got {got}")
    require_backend(packed.device, "packed")
    temperatures = _checked_temperatures(temperatures)
    labels = _has_labels(packed.shape, codec, k, vocab_size, temperatures, method)
    counted, rows = method == "sample", packed.reshape(packed.shape[:-1].numel(), packed.shape[-1])
    values = ops.unpack_logits(rows, codec, k, vocab_size, temperatures, labels, counted)
    fields = dict(zip(FIELDS, values, strict=True))
    absent = {name: None for name, there in (("label_logprob", labels), ("counts", counted)) if not there}
    return {**fields, **absent, "temperatures": temperatures, "vocab_size": vocab_size}


def _has_labels(
    shape: torch.Size, codec: str, k: int, vocab_size: int, temperatures: tuple[float, ...], method: str
) -> bool:
    """Whether records of this width have label log-probabilities; ValueError where there are no such records."""
    widths = [
        record_bytes(codec, k=k, vocab_size=vocab_size, temperatures=temperatures, labels=labels, method=method)
        for labels in (False, True)
    ]
    if len(shape) < 1 or shape[-1] not in widths:
        raise ValueError(
            f"packed must have shape [..., {widths[1]}] (with labels) or [..., {widths[0]}] for codec {codec!r}, "
            f"k = {k}, vocab_size = {vocab_size}, {len(temperatures)} temperatures and method {method!r}, "
            f"got {list(shape)}"
        )
    return shape[-1] == widths[1]
