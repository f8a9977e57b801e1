"""The losses as people write them in PyTorch: the fastest plain formula, not the most careful one.

log-softmax of both sides in float32, probabilities by exp, mixtures in probability space (so they underflow where
`distillm_ext.reference.dense` does not). Mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALPHA, SYMMETRIC, JS, A, B, MU, T = 0.1, 0.9, 0.5, 0.2, 0.7, 0.5, 0.4
# What `distillation_loss` has to be told beside the name, for the same numbers.
OPTIONS: dict[str, dict[str, float]] = {"interpolated": {"alpha": T}}

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
    "adaptive_kl": lambda p, lp, q, lq: _adaptive_kl(p, lp, q, lq),
    "interpolated": lambda p, lp, q, lq: _interpolated(lp, lq),
}


def _js(p: Tensor, lp: Tensor, q: Tensor, lq: Tensor, lm: Tensor) -> Tensor:
    return JS * p * (lp - lm) + (1 - JS) * q * (lq - lm)


def _alpha_beta(lp: Tensor, lq: Tensor) -> Tensor:
    cross = (A * lp + B * lq).exp()
    return -(cross - A / (A + B) * ((A + B) * lp).exp() - B / (A + B) * ((A + B) * lq).exp()) / (A * B)


def _token_adaptive(p: Tensor, lp: Tensor, q: Tensor, lq: Tensor, w: Tensor) -> Tensor:
    return w * p * (lp - lq) + (1 - w) * q * (lq - lp)


def _adaptive_kl(p: Tensor, lp: Tensor, q: Tensor, lq: Tensor) -> Tensor:
    with torch.no_grad():
        mass, order = p.sort(-1, descending=True)
        inside = mass.cumsum(-1) <= MU
        inside[..., 0] = True
        head, distance = torch.zeros_like(inside).scatter(-1, order, inside), (p - q).abs()
        share = (distance * ~head).sum(-1, keepdim=True) / distance.sum(-1, keepdim=True)
    return (1 - share) * p * (lp - lq) + share * q * (lq - lp)


def _interpolated(lp: Tensor, lq: Tensor) -> Tensor:
    target = ((1 - T) * lq + T * lp).detach().log_softmax(-1)
    return target.exp() * (target - lq)


def loss(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    lq, lp = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return FORMULAS[divergence](lp.exp(), lp, lq.exp(), lq).sum(-1).mean()
