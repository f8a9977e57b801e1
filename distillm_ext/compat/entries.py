"""Divergences entry by entry, for the `reduction="none"` of other projects: eager formulas, differentiable by autograd.

No kernel of ours writes a value per entry, since no training loss needs one.
"""

from __future__ import annotations

import math

from torch import Tensor


def kl_entries(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """a (log a - log b), 0 where a is 0, and its gradient with it; +inf where b is 0 and a is not."""
    absent = a == 0
    return a * (log_a.masked_fill(absent, 0.0) - log_b.masked_fill(absent, 0.0))


def generalized_js_entries(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta p log(p/m) + (1 - beta) q log(q/m), m = beta p + (1 - beta) q; at beta 0 and 1 KL(p || q) and KL(q || p)."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return kl_entries(p, log_p, log_q)
    if beta == 1:
        return kl_entries(q, log_q, log_p)
    # Where both sides are -inf, whatever stands in for their mixture is left out by kl_entries.
    absent = (p == 0) & (q == 0)
    log_m = (
        (log_p + math.log(beta))
        .masked_fill(absent, 0.0)
        .logaddexp((log_q + math.log1p(-beta)).masked_fill(absent, 0.0))
    )
    return beta * kl_entries(p, log_p, log_m) + (1 - beta) * kl_entries(q, log_q, log_m)
