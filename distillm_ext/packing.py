"""`pack` and `unpack`: compressed logits as bytes and back, on the device where they are.

A record has a fixed number of bytes, decided by k, the vocabulary size, the temperatures, the codec and whether there
are labels and counts; `record_bytes` says how many. `distillm_ext._codec` makes the same bytes from NumPy arrays
without torch.

What a codec keeps of the log-probabilities at T = 1, with r = min(largest - smallest, 32 nats) over the row:

======  ===================  ==========================================================
codec   bits per value       error before the shift below
======  ===================  ==========================================================
q4      4                    at most r / 30
q6      6                    at most r / 126
q8      8                    at most r / 510
fp16    16                   at most 2^-11 of the value (from -65504 on)
exact   32                   none
======  ===================  ==========================================================

The q codecs cut uniform steps from the row's largest value downwards: the largest has no error, and what lies more
than 32 nats below it (a factor of 1.3e-14) is stored as 32 nats below it. After decoding, all but "exact" add one
constant per row, so that kept entries and tail sum to 1 at T = 1. It is no larger than the error above (plus 5e-4 from
the rounding of the tail): in all, an error is at most twice the bound above, plus 5e-4 and 2^-23 over the kept mass.
Without T = 1 among the temperatures there is no such tail; the largest value is then a float16 and nothing is added.

Ids are exact. `tail_logprob` and `label_logprob` are float16 (float32 in "exact"), where a log tail mass that would
round to 0 beside kept entries becomes -2^-24. `log_norm` follows from values and tail, so that probabilities sum to 1
at every temperature (method "topk"), or is float16 ("sample").

Unpacked entries are sorted as `CompressedLogits` says; "exact" returns them bit by bit in the order they had. An
invalid row stays invalid: all padding, NaN in the other fields.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .compressed_logits import CompressedLogits
from .record_format import CODECS, METHODS, record_bytes

__all__ = ["CODECS", "METHODS", "pack", "record_bytes", "unpack"]


def pack(compressed: CompressedLogits, codec: str = "q8") -> Tensor:
    """Compressed logits as bytes.

    Args:
        compressed: [...] positions, of both methods, on a CPU or CUDA device.
        codec: "q4", "q6", "q8", "fp16" or "exact"; the table of this module gives their errors.

    Returns:
        uint8 [..., bytes] on the same device, bytes = `record_bytes` of the same settings.

    Raises:
        TypeError: not a CompressedLogits; "exact" for float64 log-probabilities, which it cannot hold.
        ValueError: unknown codec.

    Example:
        >>> compressed = compress_logits(torch.randn(2, 8, 32000), k=64)
        >>> pack(compressed, "q8").shape
        torch.Size([2, 8, 147])
    """
    if not isinstance(compressed, CompressedLogits):
        raise TypeError(f"compressed must be CompressedLogits, got {type(compressed).__name__}")
    return compressed.pack(codec)


def unpack(
    packed: Tensor,
    *,
    codec: str = "q8",
    k: int,
    vocab_size: int,
    temperatures: Sequence[float] = (1.0,),
    method: str = "topk",
) -> CompressedLogits:
    """Inverse of `pack`, up to the error of the codec.

    Whether there are label log-probabilities follows from the number of bytes. Any bytes of the right width are safe to
    unpack: what cannot be an entry becomes padding, what cannot be a row an invalid one. Detecting damage is the task
    of the cache.

    Args:
        packed: uint8 [..., bytes] on a CPU or CUDA device.
        codec, k, vocab_size, temperatures, method: as they were packed.

    Raises:
        TypeError: packed is not a uint8 tensor.
        ValueError: unknown codec or method, or a width that does not fit the settings.

    Example:
        >>> unpack(packed, codec="q8", k=64, vocab_size=32000).ids.shape
        torch.Size([2, 8, 64])
    """
    return CompressedLogits.unpack(
        packed, codec=codec, k=k, vocab_size=vocab_size, temperatures=temperatures, method=method
    )
