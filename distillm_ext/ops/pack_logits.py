"""Operators `pack_logits` and `unpack_logits`: typed calls and fakes. Neither is differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from distillm_ext import _codec

from . import extension  # noqa: F401  (loads the libraries)

Unpacked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.compiler.assume_constant_result  # decided by constants, and no business of a traced graph
def record_bytes(
    codec: str, k: int, vocab_size: int, temperatures: tuple[float, ...], has_labels: bool, has_counts: bool
) -> int:
    """Bytes of a record with these settings; ValueError where there is none."""
    return _codec.record_bytes(codec, k, vocab_size, temperatures, has_labels, has_counts)


def pack_logits(
    ids: Tensor,
    logprobs: Tensor,
    log_norm: Tensor,
    tail_logprob: Tensor,
    label_logprob: Tensor | None,
    valid: Tensor,
    counts: Tensor | None,
    vocab_size: int,
    temperatures: tuple[float, ...],
    codec: str,
) -> Tensor:
    """Records [R, bytes] uint8 of the fields of R positions."""
    return torch.ops.distillm_ext.pack_logits(
        ids, logprobs, log_norm, tail_logprob, label_logprob, valid, counts, vocab_size, list(temperatures), codec
    )


def unpack_logits(
    packed: Tensor,
    codec: str,
    k: int,
    vocab_size: int,
    temperatures: tuple[float, ...],
    has_labels: bool,
    has_counts: bool,
) -> Unpacked:
    """Fields of the records [R, bytes]: ids, logprobs, log_norm, tail, label, valid, counts; absent ones are empty."""
    return torch.ops.distillm_ext.unpack_logits(
        packed, codec, k, vocab_size, list(temperatures), has_labels, has_counts
    )


@torch.library.register_fake("distillm_ext::pack_logits")
def _pack_fake(
    ids: Tensor,
    logprobs: Tensor,
    log_norm: Tensor,
    tail_logprob: Tensor,
    label_logprob: Tensor | None,
    valid: Tensor,
    counts: Tensor | None,
    vocab_size: int,
    temperatures: list[float],
    codec: str,
) -> Tensor:
    rows, k = ids.shape
    width = record_bytes(codec, int(k), vocab_size, tuple(temperatures), label_logprob is not None, counts is not None)
    return ids.new_empty((rows, width), dtype=torch.uint8)


@torch.library.register_fake("distillm_ext::unpack_logits")
def _unpack_fake(
    packed: Tensor,
    codec: str,
    k: int,
    vocab_size: int,
    temperatures: list[float],
    has_labels: bool,
    has_counts: bool,
) -> Unpacked:
    rows, temperature_count = packed.shape[0], len(temperatures)

    def empty(*shape: int | torch.SymInt, dtype: torch.dtype = torch.float32) -> Tensor:
        return packed.new_empty(shape, dtype=dtype)

    return (
        empty(rows, k, dtype=torch.int32),
        empty(rows, k),
        empty(rows, temperature_count),
        empty(rows, temperature_count),
        empty(rows if has_labels else 0),
        empty(rows, dtype=torch.bool),
        empty(rows, k, dtype=torch.int32) if has_counts else empty(0, dtype=torch.int32),
    )
