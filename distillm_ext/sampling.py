"""Drawing tokens: the stateless public API of the operator `sample_tokens`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .containers import SampledTokens
from .ops.extension import require_backend
from .ops.sample_tokens import sample_tokens as sample_tokens_op

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_VOCABULARY = (1 << 20) - 1  # sums of 44-bit masses fit 64 bits
_LEAST_INT64, _LARGEST_INT64 = -(1 << 63), (1 << 63) - 1
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    position: int | Tensor,
    repetition_penalty: float | Tensor = 1.0,
    previous_tokens: Tensor | None = None,
    banned: Tensor | None = None,
) -> SampledTokens:
    r"""Draws one token per row, exactly and reproducibly.

    In this order: repetition penalty, banned tokens, temperature (:math:`p = \mathrm{softmax}(z/T)`), top-k (exactly k
    tokens, lower ids first among equal logits), top-p on the mass that top-k leaves (the most probable tokens until
    their mass reaches ``top_p``, the one that crosses included; Holtzman et al., ICLR 2020), min-p (no token below
    ``min_p`` times the largest probability; Nguyen et al., ICLR 2025). Then the token at which the cumulative mass, in
    the order of ids, exceeds a uniform draw. Masses are 64-bit integers and the draw has 64 bits: tokens down to 31
    nats below the most probable one come up as often as they should, and rounding never selects a token without mass.

    The draw is Philox4x32-10 of (seed, position). A row's token depends on its logits, its parameters, seed and
    position alone: not on the batch around it, the number of threads or the instruction set; CPU and CUDA give the same
    token. Rows with the same seed and position get the same draw, so give each sequence a seed of its own.

    A row whose logits hold a NaN or +inf, are all -inf or all banned, or whose parameters (in a tensor) are out of
    range gets token 0, log-probabilities NaN and ``valid`` False; other rows are not touched.

    Each of temperature, top_k, top_p, min_p, seed, position and repetition_penalty is a number or a tensor [rows].

    Args:
        logits: [rows, V], float32, bfloat16 or float16, V < 2²⁰; rows may be strided.
        temperature: T >= 0; 0 is greedy: the largest logit, lowest id among equals, without filters or draw.
        top_k: >= 0; 0 keeps all.
        top_p: in (0, 1].
        min_p: in [0, 1].
        seed: int64.
        position: int64, such as the index of the token in its sequence.
        repetition_penalty: > 0; logits of ``previous_tokens`` are divided by it where positive and multiplied by it
            where negative (CTRL, Keskar et al., 2019).
        previous_tokens: [rows, n] int64, each id counted once; ids outside [0, V), such as -1, are padding.
        banned: [V] or [rows, V] bool, True where a token must not come up.

    Returns:
        SampledTokens: ``tokens`` [rows] int64; ``logprobs`` [rows] float32, the log-probability of the token under
        softmax(logits) in nats, before penalty, mask, temperature and filters; ``filtered_logprobs`` [rows] float32,
        under the distribution that the token was drawn from (0 for greedy rows); ``valid`` [rows] bool.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Example:
        >>> logits = torch.randn(4, 32000)
        >>> seeds = torch.arange(4)
        >>> drawn = sample_tokens(logits, temperature=0.8, top_k=50, top_p=0.9, seed=seeds, position=17)
        >>> drawn.tokens.shape
        torch.Size([4])
    """
    check_logits(logits)
    outputs = sample_tokens_op(
        logits.detach(),
        temperature=_real(temperature, "temperature", logits, "finite and >= 0", lambda x: 0 <= x < math.inf),
        top_k=_integer(top_k, "top_k", logits, least=0),
        top_p=_real(top_p, "top_p", logits, "in (0, 1]", lambda x: 0 < x <= 1),
        min_p=_real(min_p, "min_p", logits, "in [0, 1]", lambda x: 0 <= x <= 1),
        seed=_integer(seed, "seed", logits),
        position=_integer(position, "position", logits),
        repetition_penalty=_real(
            repetition_penalty, "repetition_penalty", logits, "finite and > 0", lambda x: 0 < x < math.inf
        ),
        previous_tokens=_previous_tokens(previous_tokens, logits),
        banned=_banned(banned, logits),
    )
    return SampledTokens(*outputs)


def check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}.")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16 or float16, got {logits.dtype}.")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= _MAX_VOCABULARY:
        raise ValueError(
            f"logits must have shape [rows, V] with 1 <= V <= {_MAX_VOCABULARY}, got {list(logits.shape)}."
        )
    require_backend(logits.device, "logits")


def _check_rows(value: Tensor, name: str, logits: Tensor) -> None:
    if value.shape != logits.shape[:1]:
        raise ValueError(f"{name} must be a number or have shape [{logits.shape[0]}], got {list(value.shape)}.")
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {value.device}.")


def _real(
    value: float | Tensor, name: str, logits: Tensor, expected: str, legal: Callable[[float], bool]
) -> float | Tensor:
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}.")
        _check_rows(value, name, logits)
        return value.detach().float()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor [rows], got {type(value).__name__}.")
    if not legal(value):
        raise ValueError(f"{name} must be {expected}, got {value}.")
    return _representable(float(value), name)


def _representable(value: float, name: str) -> float:
    """The kernels see float32: what is positive stays positive and finite there."""
    if value != 0 and not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be 0 or between {_SMALLEST:.3g} and {_LARGEST:.3g}, got {value}.")
    return value


def _integer(value: int | Tensor, name: str, logits: Tensor, least: int | None = None) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {value.dtype}.")
        _check_rows(value, name, logits)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a tensor [rows], got {type(value).__name__}.")
    if not (_LEAST_INT64 if least is None else least) <= value <= _LARGEST_INT64:
        raise ValueError(f"{name} must be an int64{'' if least is None else f' >= {least}'}, got {value}.")
    return value


def _previous_tokens(value: Tensor | None, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(
            f"previous_tokens must be an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}."
        )
    if value.dim() != 2 or value.shape[0] != logits.shape[0]:
        raise ValueError(f"previous_tokens must have shape [{logits.shape[0]}, n], got {list(value.shape)}.")
    if value.device != logits.device:
        raise ValueError(f"previous_tokens must be on the device of logits, {logits.device}, got {value.device}.")
    return value


def _banned(value: Tensor | None, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"banned must be a bool tensor, got {getattr(value, 'dtype', type(value).__name__)}.")
    if value.shape not in (logits.shape, logits.shape[1:]):
        rows, vocab = logits.shape
        raise ValueError(f"banned must have shape [{vocab}] or [{rows}, {vocab}], got {list(value.shape)}.")
    if value.device != logits.device:
        raise ValueError(f"banned must be on the device of logits, {logits.device}, got {value.device}.")
    return value
