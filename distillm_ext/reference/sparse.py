"""The sparse divergences as eager PyTorch formulas in log space, differentiable by autograd.

Oracle of tests (in float64). Nothing in the package falls back to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks.options import DEFAULT_ALPHA, DEFAULT_BETA
from ..compressed_logits import CompressedLogits
from . import dense

# log of a student without mass off the kept entries, where a divergence asks for it.
LEAST_LOG_TAIL = -1022 * 0.6931471805599453


def kept_mask(ids: Tensor, vocab_size: int) -> Tensor:
    """Ids inside the teacher's vocabulary, of equal ones the first."""
    inside = (ids >= 0) & (ids < vocab_size)
    equal = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    earlier = torch.ones(equal.shape[-2:], dtype=torch.bool, device=ids.device).tril(-1)
    return inside & ~(equal & earlier).any(-1)


def _divergence(name: str, log_p: Tensor, log_q: Tensor, alpha: Tensor, beta: Tensor, detach_mixture: bool) -> Tensor:
    formulas = {
        "forward_kl": lambda: dense.forward_kl(log_p, log_q),
        "reverse_kl": lambda: dense.reverse_kl(log_p, log_q),
        "skew_kl": lambda: dense.skew_kl(log_p, log_q, alpha),
        "skew_reverse_kl": lambda: dense.skew_reverse_kl(log_p, log_q, alpha, detach_mixture),
        "generalized_js": lambda: dense.generalized_js(log_p, log_q, beta),
        "total_variation": lambda: dense.total_variation(log_p, log_q),
    }
    if name not in formulas:
        raise ValueError(f"divergence '{name}' has no sparse reference formula.")
    return formulas[name]()


def _sampled(name: str, log_p: Tensor, log_q: Tensor, share: Tensor, alpha: Tensor, detach_mixture: bool) -> Tensor:
    """Importance forms over the sampled entries; log_p 0 and share 0 at padding."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return (share * (log_p - log_q)).sum(-1)
    if name == "skew_kl":
        return (share * (p / (alpha * p + (1 - alpha) * q)).log()).sum(-1)
    if name == "total_variation":
        return (share * (1 - q / p).clamp(min=0)).sum(-1)
    if name != "skew_reverse_kl":
        raise ValueError(f"divergence '{name}' has no sampled form.")
    absent = q == 0  # adds nothing, and keeps inf - inf out of the gradient
    q = q.masked_fill(absent, 1.0)
    x = (1 - alpha) * p / (alpha * q)
    if detach_mixture:
        # q log(q/m) with m constant has the gradient q (log(q/m) + 1), of which log(1 + x) is all that counts.
        x = x.detach()
    return -alpha.log().squeeze(-1) - (share * (q / p * torch.log1p(x)).masked_fill(absent, 0.0)).sum(-1)


def sparse_divergence(
    student_logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    log_norm: Tensor,
    tail_logprob: Tensor,
    counts: Tensor | None = None,
    *,
    vocab_size: int,
    divergence: str,
    tail: str = "bucket",
    alpha: float | Tensor | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    detach_mixture: bool = False,
) -> Tensor:
    """Divergence of every position [...] from logits [..., V] and a compressed teacher of `vocab_size` entries.

    ids, logprobs, counts [..., K]; log_norm and tail_logprob [...] at `temperature`. Definitions: `distillation_loss`.
    """
    kept, vocab = kept_mask(ids, vocab_size), student_logits.shape[-1]
    if tail == "sampled":
        assert counts is not None
        kept = kept & (counts > 0) & (logprobs > -torch.inf)
    log_q_all = (student_logits / temperature).log_softmax(-1)
    index = ids.long().clamp(0, vocab - 1)
    there = kept & (ids < vocab)
    log_q = log_q_all.gather(-1, index).masked_fill(~there, -torch.inf)
    log_p = (logprobs / temperature - log_norm.unsqueeze(-1)).masked_fill(~kept, -torch.inf)
    alpha = DEFAULT_ALPHA.get(divergence, 0.0) if alpha is None else alpha
    beta = DEFAULT_BETA.get(divergence, 0.0) if beta is None else beta
    a, b = (torch.as_tensor(x, dtype=log_q.dtype, device=log_q.device).unsqueeze(-1) for x in (alpha, beta))
    if tail == "sampled":
        assert counts is not None
        share = counts.to(log_q.dtype) * kept
        share = share / share.sum(-1, keepdim=True)
        return _sampled(
            divergence, log_p.masked_fill(~kept, 0.0), log_q.masked_fill(~kept, 0.0), share, a, detach_mixture
        )
    if tail == "renormalize":
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    elif not (tail == "truncate" and divergence == "reverse_kl"):
        log_t = tail_logprob if tail == "bucket" else torch.full_like(tail_logprob, -torch.inf)
        log_r = _log_tail(log_q_all, index, there, divergence)
        log_p, log_q = (torch.cat([x, y.unsqueeze(-1)], -1) for x, y in ((log_p, log_t), (log_q, log_r)))
    return _divergence(divergence, log_p, log_q, a, b, detach_mixture)


def _log_tail(log_q: Tensor, index: Tensor, there: Tensor, divergence: str) -> Tensor:
    """log of the student's mass off the kept entries, a constant where there is none."""
    # Forward KL, which skew KL is at alpha = 0, looks at the logarithm alone; others need the mass to be 0 too.
    least = LEAST_LOG_TAIL if divergence in ("forward_kl", "skew_kl") else -torch.inf
    on = torch.zeros_like(log_q, dtype=torch.int32).scatter_add(-1, index, there.int()) > 0
    off = log_q.masked_fill(on, -torch.inf)
    empty = (off == -torch.inf).all(-1)
    log_r = off.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1)
    return log_r.masked_fill(empty, least)


def per_token_sparse_divergence(student_logits: Tensor, teacher: CompressedLogits, **options) -> Tensor:
    """`sparse_divergence` of a container, at one of its temperatures; options as there."""
    at = teacher.temperatures.index(options.get("temperature", 1.0))
    dtype = student_logits.dtype
    return sparse_divergence(
        student_logits, teacher.ids, teacher.logprobs.to(dtype), teacher.log_norm[..., at].to(dtype),
        teacher.tail_logprob[..., at].to(dtype), teacher.counts, vocab_size=teacher.vocab_size, **options,
    )  # fmt: skip
