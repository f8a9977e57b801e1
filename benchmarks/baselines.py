"""The losses as people write them in PyTorch: the fastest plain formula, not the most careful one.

log-softmax of both sides in float32, probabilities by exp, mixtures in probability space (so they underflow where
`distillm_ext.reference` does not). Mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

ALPHA, SYMMETRIC, JS, A, B = 0.1, 0.9, 0.5, 0.2, 0.7

# (p, log p, q, log q) -> per-entry terms
Terms = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FORMULAS: dict[str, Terms] = {
    "forward_kl": lambda p, lp, q, lq: p * (lp - lq),
    "reverse_kl": lambda p, lp, q, lq: q * (lq - lp),
    "symmetric_kl": lambda p, lp, q, lq: (1 - SYMMETRIC) * p * (lp - lq) + SYMMETRIC * q * (lq - lp),
    "skew_kl": lambda p, lp, q, lq: p * (lp - (ALPHA * p + (1 - ALPHA) * q).log()),
    "skew_reverse_kl": lambda p, lp, q, lq: q * (lq - ((1 - ALPHA) * p + ALPHA * q).log()),
    "generalized_js": lambda p, lp, q, lq: _js(p, lp, q, lq, (JS * p + (1 - JS) * q).log()),
    "total_variation": lambda p, lp, q, lq: 0.5 * (p - q).abs(),
    "alpha_beta": lambda p, lp, q, lq: _alpha_beta(lp, lq),
    "token_adaptive": lambda p, lp, q, lq: _token_adaptive(p, lp, q, lq, (p / (p + q)).detach()),
}


def _js(p: Tensor, lp: Tensor, q: Tensor, lq: Tensor, lm: Tensor) -> Tensor:
    return JS * p * (lp - lm) + (1 - JS) * q * (lq - lm)


def _alpha_beta(lp: Tensor, lq: Tensor) -> Tensor:
    cross = (A * lp + B * lq).exp()
    return -(cross - A / (A + B) * ((A + B) * lp).exp() - B / (A + B) * ((A + B) * lq).exp()) / (A * B)


def _token_adaptive(p: Tensor, lp: Tensor, q: Tensor, lq: Tensor, w: Tensor) -> Tensor:
    return w * p * (lp - lq) + (1 - w) * q * (lq - lp)


def loss(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    lq, lp = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return FORMULAS[divergence](lp.exp(), lp, lq.exp(), lq).sum(-1).mean()
