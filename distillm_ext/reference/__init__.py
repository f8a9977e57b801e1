"""The eager formulas: oracle of the tests (in float64) and baseline of the benchmarks. Nothing falls back to them."""

from .compression import compress_logits_reference
from .dense import (
    adaptive_kl,
    alpha_beta,
    forward_kl,
    generalized_js,
    head_of,
    interpolated,
    per_token_divergence,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    token_adaptive,
    total_variation,
)
from .sparse import per_token_sparse_divergence

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "compress_logits_reference",
    "forward_kl",
    "generalized_js",
    "head_of",
    "interpolated",
    "per_token_divergence",
    "per_token_sparse_divergence",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "token_adaptive",
    "total_variation",
]
