"""Types of the compiled NumPy codec (csrc/codec.cpp)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Most entries, or draws, that a record keeps of a row.
MAX_K: int

def pack_logits(
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
    log_norm: NDArray[np.float32],
    tail_logprob: NDArray[np.float32],
    label_logprob: NDArray[np.float32] | None,
    valid: NDArray[np.bool_],
    counts: NDArray[np.int32] | None,
    vocab_size: int,
    temperatures: Sequence[float],
    codec: str,
) -> NDArray[np.uint8]: ...
def unpack_logits(
    packed: NDArray[np.uint8],
    codec: str,
    k: int,
    vocab_size: int,
    temperatures: Sequence[float],
    has_labels: bool,
    has_counts: bool,
) -> tuple[
    NDArray[np.int32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32],
    NDArray[np.float32] | None,
    NDArray[np.bool_],
    NDArray[np.int32] | None,
]: ...
def record_bytes(
    codec: str, k: int, vocab_size: int, temperatures: Sequence[float], has_labels: bool, has_counts: bool
) -> int: ...
def trim_records(
    packed: NDArray[np.uint8],
    codec: str,
    k: int,
    vocab_size: int,
    temperatures: Sequence[float],
    has_labels: bool,
    has_counts: bool,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
def restore_records(
    trimmed: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    codec: str,
    k: int,
    vocab_size: int,
    temperatures: Sequence[float],
    has_labels: bool,
    has_counts: bool,
) -> NDArray[np.uint8]: ...
