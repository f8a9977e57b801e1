"""Compression of teacher logits as an eager formula: oracle of tests (in float64). Nothing falls back to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..compressed_logits import PADDING_ID, CompressedLogits

_SAMPLE_TEACHER = 1  # purpose of the draw: csrc/math/sampling/philox.h
_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011)."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & _WORD, (left >> 32) ^ d ^ k1, left & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return a, b, c, d


def uniform(seed: int, position: int) -> float:
    """The number in (0, 1) that systematic sampling draws for a row."""
    counter = (position & _WORD, position >> 32 & _WORD, _SAMPLE_TEACHER, 0)
    low, high, _, _ = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    bits = high << 32 | low
    return (bits >> 11) * 2.0**-53 if bits >> 11 else ((bits & 0x7FF) + 0.5) * 2.0**-64


def compress_logits_reference(
    logits: Tensor,
    k: int = 64,
    *,
    method: str = "topk",
    temperatures: tuple[float, ...] = (1.0,),
    labels: Tensor | None = None,
    seed: int = 0,
    position: Tensor | None = None,
) -> CompressedLogits:
    """`compress_logits` by sorts and cumulative sums, in the dtype of `logits` (float32 for narrower ones)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    valid = ~(z.isnan() | (z == torch.inf)).any(-1) & (z > -torch.inf).any(-1)
    log_p = z.masked_fill(~valid.unsqueeze(-1), 0.0).log_softmax(-1)
    counts = None
    if method == "sample":
        if position is None:
            raise ValueError("method 'sample' needs a position per row.")
        counts = systematic_counts(log_p.double().exp(), k, seed, position)
    kept = (log_p > -torch.inf if counts is None else counts > 0) & valid.unsqueeze(-1)
    # Stable: ids ascend among equal values. Logits and log-probabilities tie differently; the logits decide.
    order = z.masked_fill(~kept, -torch.inf).sort(stable=True, dim=-1, descending=True).indices
    order = order[..., :k] if counts is None else order[..., : min(k, order.shape[-1])]
    chosen = kept.gather(-1, order)
    ids = torch.where(chosen, order, PADDING_ID).int()
    tail = torch.ones_like(kept).scatter(-1, order, ~chosen)
    scaled = torch.stack([log_p / t for t in temperatures], -2)
    log_norm = scaled.logsumexp(-1)
    left_out = scaled.masked_fill(~tail.unsqueeze(-2), -torch.inf).logsumexp(-1)
    bad = ~valid.unsqueeze(-1)
    return CompressedLogits(
        ids=_padded(ids, k, PADDING_ID),
        logprobs=_padded(torch.where(chosen, log_p.gather(-1, order), -torch.inf), k, -torch.inf),
        log_norm=log_norm.masked_fill(bad, torch.nan),
        tail_logprob=(left_out - log_norm).masked_fill(bad, torch.nan),
        label_logprob=None if labels is None else _label_logprob(log_p, labels, valid),
        valid=valid,
        counts=None if counts is None else _padded(torch.where(chosen, counts.gather(-1, order), 0).int(), k, 0),
        temperatures=tuple(float(t) for t in temperatures),
        vocab_size=logits.shape[-1],
    )


def systematic_counts(p: Tensor, draws: int, seed: int, position: Tensor) -> Tensor:
    """floor(N C_i + u) - floor(N C_(i-1) + u), C the cumulative sum of p [..., V] in the order of the ids."""
    u = torch.tensor([uniform(seed, int(x)) for x in position.reshape(-1).tolist()], dtype=p.dtype, device=p.device)
    cumulative = p.cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]
    # A u within rounding of 1 must not make one draw too many.
    reached = (draws * cumulative + u.reshape(position.shape).unsqueeze(-1)).floor().clamp(max=draws)
    return reached.diff(dim=-1, prepend=torch.zeros_like(reached[..., :1])).int()


def _label_logprob(log_p: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    inside = (labels >= 0) & (labels < log_p.shape[-1]) & valid
    found = log_p.gather(-1, labels.long().clamp(0, log_p.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(~inside, torch.nan)


def _padded(x: Tensor, k: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, k - x.shape[-1]), value=value)
