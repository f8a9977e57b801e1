"""Teacher logits compressed to what a loss needs of them: public functions, argument checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._codec import MAX_K
from .checks.heads import check_head, checked_chunk
from .compressed_logits import CompressedLogits
from .containers import LinearHead
from .ops.extension import require_backend
from .ops.linear_chunks import MIN_CHUNK_ROWS, project
from .ops.topk_logits import TopkLogits, topk_logits
from .record_format import METHODS

MAX_TEMPERATURES = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the logits of one chunk of `capture_from_hidden` may take.
_MEMORY_BUDGET = 128 * 2**20


def compress_logits(
    logits: Tensor,
    k: int = 64,
    *,
    method: str = "topk",
    temperatures: Sequence[float] = (1.0,),
    labels: Tensor | None = None,
    seed: int = 0,
    position: Tensor | None = None,
) -> CompressedLogits:
    r"""The k entries of each position that matter, with their log-probabilities and the mass of all others.

    ``method="topk"`` keeps the k most probable entries (lower ids first among equals). The mass of the rest is a sum of
    what was left out, not a difference to 1, so it is exact however small it is, and is given at every temperature that
    training will use: it cannot be recovered from log-probabilities at T = 1.

    ``method="sample"`` draws k entries from :math:`p` at T = 1 by systematic sampling in the order of the ids:
    entry i is drawn :math:`c_i = \lfloor k C_i + u \rfloor - \lfloor k C_{i-1} + u \rfloor` times, :math:`C` the
    cumulative distribution and :math:`u` one uniform number per position, so :math:`E[c_i / k] = p_i` exactly. Random
    sampling distillation: Anshumann et al., ACL 2025. The draws depend on (logits, k, seed, position) alone: not on the
    batch, other rows or threads.

    One pass over the logits for "topk" (three for "sample"), and no temporary of their size. No gradient.

    Args:
        logits: [..., V] of the teacher; float32, bfloat16 or float16 (float64 on the CPU); any strides.
        k: entries to keep or draw, 1 to 4096, the most that a packed record holds, or up to V.
        method: "topk" or "sample".
        temperatures: 1 to 16 positive numbers, the T at which `log_norm` and `tail_logprob` are wanted.
        labels: [...], integer; their log-probabilities are kept too.
        seed: of the draws; any int of 64 bits.
        position: [...], integer, for "sample" only: what tells a row's draws from those of others under the same seed,
            for instance a hash of its context, or example * length + token.

    Returns:
        `CompressedLogits` of the positions; its docstring says what padding, -inf and bad rows give.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, name or range.

    Example:
        >>> logits = torch.randn(2, 8, 32000)
        >>> compressed = compress_logits(logits, k=64, temperatures=(1.0, 2.0))
        >>> drawn = compress_logits(logits, k=24, method="sample", position=torch.arange(16).view(2, 8))
    """
    check_logits(logits)
    shape, device = logits.shape[:-1], logits.device
    _check_k(k, logits.shape[-1])
    temperatures = checked_temperatures(temperatures)
    _check_method(method, position, seed)
    labels = _checked_rows(labels, "labels", shape, device, "logits")
    position = _checked_rows(position, "position", shape, device, "logits")
    found = topk_logits(logits.reshape(-1, logits.shape[-1]), labels, position, k, temperatures, _signed(seed))
    return _compressed(found, labels, method, shape, temperatures, logits.shape[-1])


def capture_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    k: int = 64,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    labels: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
    method: str = "topk",
    seed: int = 0,
    position: Tensor | None = None,
    chunk_rows: int | None = None,
) -> CompressedLogits:
    r"""`compress_logits` of a language-model head's output, whose logits exist for a chunk of positions at a time.

    With :math:`z = h W^\top + b` the logits are :math:`\mathrm{scale} \cdot z`, or with a soft-cap
    :math:`c \tanh(\mathrm{scale} \cdot z / c)`, formed in the dtype of `weight`. The memory beyond the result is
    ``chunk_rows`` x V logits. No gradient.

    Args:
        hidden: [..., H], the teacher's last hidden states (after the final norm); converted to the dtype of `weight`.
        weight: [V, H], of the head.
        k, labels, temperatures, method, seed, position: see `compress_logits`.
        bias: [V].
        softcap: c > 0 (Gemma 2: 30), None for none.
        scale: factor on the head's output, > 0.
        chunk_rows: the most positions whose logits exist at a time; None: as many as 128 MiB hold (at least 16).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, name or range.

    Example:
        >>> hidden, weight = torch.randn(2, 8, 128), torch.randn(32000, 128)
        >>> compressed = capture_from_hidden(hidden, weight, 64)
    """
    check_head(LinearHead(hidden, weight, bias, softcap, scale), ("hidden", "weight", "bias", "softcap", "scale"))
    if weight.dtype == torch.float64 and weight.device.type == "cuda":
        raise TypeError("weight must be float32, bfloat16 or float16 on CUDA; float64 is for the CPU.")
    require_backend(hidden.device, "hidden")
    shape, vocab = hidden.shape[:-1], weight.shape[0]
    _check_k(k, vocab)
    temperatures = checked_temperatures(temperatures)
    _check_method(method, position, seed)
    labels = _checked_rows(labels, "labels", shape, hidden.device, "hidden")
    position = _checked_rows(position, "position", shape, hidden.device, "hidden")
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    size = checked_chunk(chunk_rows) or max(MIN_CHUNK_ROWS, _MEMORY_BUDGET // (vocab * weight.dtype.itemsize))
    parts = _captured_chunks(
        rows, LinearHead(rows, weight.detach(), bias, softcap, scale), size, labels, position, k, temperatures, seed
    )
    found = parts[0] if len(parts) == 1 else TopkLogits(*(torch.cat(field) for field in zip(*parts, strict=True)))
    return _compressed(found, labels, method, shape, temperatures, vocab)


@torch.no_grad()
def _captured_chunks(
    rows: Tensor,
    head: LinearHead,
    size: int,
    labels: Tensor | None,
    position: Tensor | None,
    k: int,
    temperatures: tuple[float, ...],
    seed: int,
) -> list[TopkLogits]:
    """One result per chunk of rows, at least one: all chunks share one buffer of logits."""
    weight = head.weight
    bias = None if head.bias is None else head.bias.detach().to(weight.dtype)
    buffer = weight.new_empty(min(size, max(rows.shape[0], 1)), weight.shape[0])
    parts = []
    for begin in range(0, max(rows.shape[0], 1), size):
        part = slice(begin, min(begin + size, rows.shape[0]))
        logits = buffer[: part.stop - part.start]
        project(rows[part].to(weight.dtype), weight, bias, head.scale, head.softcap or 0.0, logits)
        part_labels, part_position = (None if x is None else x[part] for x in (labels, position))
        parts.append(topk_logits(logits, part_labels, part_position, k, temperatures, _signed(seed)))
    return parts


def _compressed(
    found: TopkLogits,
    labels: Tensor | None,
    method: str,
    shape: torch.Size,
    temperatures: tuple[float, ...],
    vocab_size: int,
) -> CompressedLogits:
    flat = CompressedLogits(
        ids=found.ids, logprobs=found.logprobs, log_norm=found.log_norm, tail_logprob=found.tail_logprob,
        label_logprob=None if labels is None else found.label_logprob, valid=found.valid,
        counts=found.counts if method == "sample" else None, temperatures=temperatures, vocab_size=vocab_size,
    )  # fmt: skip
    return flat.reshape(*shape)


def check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}.")
    if logits.dtype not in _DTYPES or (logits.dtype == torch.float64 and logits.device.type == "cuda"):
        raise TypeError(
            f"logits must be float32, bfloat16 or float16 (float64 on the CPU), got {logits.dtype} on {logits.device}."
        )
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {list(logits.shape)}.")
    require_backend(logits.device, "logits")


def _check_k(k: int, vocab: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}.")
    if not 1 <= k <= max(MAX_K, vocab):
        raise ValueError(f"k must lie in 1..{MAX_K}, or up to the vocabulary of {vocab}, got {k}.")


def checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    if isinstance(temperatures, (str, Tensor)) or not isinstance(temperatures, Sequence):
        raise TypeError(f"temperatures must be a tuple of numbers, got {type(temperatures).__name__}.")
    if not 1 <= len(temperatures) <= MAX_TEMPERATURES:
        raise ValueError(f"temperatures must be 1 to {MAX_TEMPERATURES} numbers, got {len(temperatures)}.")
    for t in temperatures:
        if isinstance(t, bool) or not isinstance(t, (int, float)):
            raise TypeError(f"temperatures must be numbers, got {type(t).__name__}.")
        if not 1e-6 <= t <= 1e6:
            raise ValueError(f"temperatures must lie between 1e-6 and 1e6, got {t}.")
    return tuple(float(t) for t in temperatures)


def _check_method(method: str, position: Tensor | None, seed: int) -> None:
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, got {type(method).__name__}.")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    if method == "sample" and position is None:
        raise ValueError(
            "method 'sample' needs position, an integer per position that tells its draws from others' under the seed."
        )
    if method != "sample" and position is not None:
        raise ValueError(f"position is for method='sample' only, got method={method!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}.")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}.")


def _signed(seed: int) -> int:
    """The same 64 bits as the int64 that operators take."""
    return seed - 2**64 if seed >= 2**63 else seed


def _checked_rows(value: Tensor | None, name: str, shape: torch.Size, device: torch.device, like: str) -> Tensor | None:
    """[R] int64."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}.")
    if value.shape != shape:
        raise ValueError(f"{name} must have one entry per position of {like}, {list(shape)}, got {list(value.shape)}.")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {like}, {device}, got {value.device}.")
    return value.reshape(-1).to(torch.int64)
