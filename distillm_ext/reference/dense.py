"""The divergences as eager PyTorch formulas in log space, differentiable by autograd.

Oracle of tests (in float64) and baseline of benchmarks. Nothing in the package falls back to it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checks.options import DEFAULT_ALPHA, DEFAULT_BETA


def _x_log_ratio(x: Tensor, log_x: Tensor, log_y: Tensor) -> Tensor:
    """x log(x / y) with 0 log 0 = 0, its gradient 0 there too; +inf where y is 0 and x is not."""
    absent = log_x == -torch.inf
    difference = log_x.masked_fill(absent, 0.0) - log_y.masked_fill(absent, 0.0)
    return x * difference


def _log_mix(log_a: Tensor, log_b: Tensor, share_of_a: Tensor) -> Tensor:
    """log(s a + (1 - s) b); -inf, without NaN gradients, where both are 0."""
    a, b = log_a + share_of_a.log(), log_b + (1 - share_of_a).log()
    absent = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(absent, 0.0), b.masked_fill(absent, 0.0)).masked_fill(absent, -torch.inf)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _x_log_ratio(log_p.exp(), log_p, log_q).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _x_log_ratio(log_q.exp(), log_q, log_p).sum(-1)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor) -> Tensor:
    return _x_log_ratio(log_p.exp(), log_p, _log_mix(log_p, log_q, alpha)).sum(-1)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: Tensor, detach_mixture: bool = False) -> Tensor:
    mixture = _log_mix(log_q, log_p, alpha)
    return _x_log_ratio(log_q.exp(), log_q, mixture.detach() if detach_mixture else mixture).sum(-1)


def generalized_js(log_p: Tensor, log_q: Tensor, beta: Tensor) -> Tensor:
    mixture = _log_mix(log_p, log_q, beta)
    of_p, of_q = _x_log_ratio(log_p.exp(), log_p, mixture), _x_log_ratio(log_q.exp(), log_q, mixture)
    return (beta * of_p + (1 - beta) * of_q).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_beta(log_p: Tensor, log_q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    both = a + b
    terms = (a * log_p + b * log_q).exp() - a / both * (both * log_p).exp() - b / both * (both * log_q).exp()
    return -(terms / (a * b)).sum(-1)


def token_adaptive(log_p: Tensor, log_q: Tensor) -> Tensor:
    w = (log_p.exp() / (log_p.exp() + log_q.exp()).clamp(min=1e-300)).detach()
    forward, reverse = _x_log_ratio(log_p.exp(), log_p, log_q), _x_log_ratio(log_q.exp(), log_q, log_p)
    return (w * forward + (1 - w) * reverse).sum(-1)


def head_of(log_p: Tensor, mu: Tensor) -> Tensor:
    """The head of adaptive_kl: cumulative mass up to mu, largest first, equal ones by id; the top always."""
    order = log_p.sort(stable=True, dim=-1, descending=True).indices
    inside = log_p.gather(-1, order).exp().cumsum(-1) <= mu
    inside[..., 0] = True
    return torch.zeros_like(inside).scatter(-1, order, inside)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mu: Tensor) -> Tensor:
    distance, head = (log_p.exp() - log_q.exp()).abs().detach(), head_of(log_p, mu)
    g_head, g_tail = (distance * head).sum(-1), (distance * ~head).sum(-1)
    share = torch.where(g_head + g_tail > 0, g_tail / (g_head + g_tail).clamp(min=1e-300), 0.5)
    forward, reverse = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
    # A direction without a share is left out: it may be infinite.
    weighted = torch.where(share < 1, (1 - share) * forward, 0), torch.where(share > 0, share * reverse, 0)
    return weighted[0] + weighted[1]


def interpolated(log_p: Tensor, log_q: Tensor, t: Tensor) -> Tensor:
    # Logits and log-probabilities differ by a constant of the row, which the softmax does not see.
    blend = torch.where(t == 0, log_q, torch.where(t == 1, log_p, (1 - t) * log_q + t * log_p)).detach()
    return forward_kl(blend.log_softmax(-1), log_q)


def per_token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str,
    alpha: float | Tensor | None = None,
    beta: float | None = None,
    temperature: float = 1.0,
    detach_mixture: bool = False,
) -> Tensor:
    """D(teacher, student) of every position, [...], from logits [..., V]; definitions as in `distillation_loss`.

    The narrower side of unequal vocabularies is padded with probability 0.
    """
    width = max(student_logits.shape[-1], teacher_logits.shape[-1])
    log_p, log_q = (
        (F.pad(logits, (0, width - logits.shape[-1]), value=-torch.inf) / temperature).log_softmax(-1)
        for logits in (teacher_logits.detach(), student_logits)
    )
    alpha = (DEFAULT_ALPHA.get(divergence) or 0.0) if alpha is None else alpha
    beta = (DEFAULT_BETA.get(divergence) or 0.0) if beta is None else beta
    a, b = (torch.as_tensor(x, dtype=log_q.dtype, device=log_q.device).unsqueeze(-1) for x in (alpha, beta))
    formulas = {
        "forward_kl": lambda: forward_kl(log_p, log_q),
        "reverse_kl": lambda: reverse_kl(log_p, log_q),
        "symmetric_kl": lambda: (1 - b[0]) * forward_kl(log_p, log_q) + b[0] * reverse_kl(log_p, log_q),
        "skew_kl": lambda: skew_kl(log_p, log_q, a),
        "skew_reverse_kl": lambda: skew_reverse_kl(log_p, log_q, a, detach_mixture),
        "generalized_js": lambda: generalized_js(log_p, log_q, b),
        "total_variation": lambda: total_variation(log_p, log_q),
        "alpha_beta": lambda: alpha_beta(log_p, log_q, a, b),
        "token_adaptive": lambda: token_adaptive(log_p, log_q),
        "adaptive_kl": lambda: adaptive_kl(log_p, log_q, a),
        "interpolated": lambda: interpolated(log_p, log_q, a),
    }
    if divergence not in formulas:
        raise ValueError(f"divergence '{divergence}' has no reference formula.")
    return formulas[divergence]()
