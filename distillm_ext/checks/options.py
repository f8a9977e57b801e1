"""Names and hyper-parameters of the divergences: published defaults and checks, shared by every loss."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from ..ops.divergence import DivergenceOptions

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "skew_kl",
    "skew_reverse_kl",
    "generalized_js",
    "total_variation",
    "alpha_beta",
    "token_adaptive",
    "adaptive_kl",
    "interpolated",
)
# Published defaults of the hyper-parameters, None where one has to be given; a divergence that is not listed has none
# of that name.
DEFAULT_ALPHA: dict[str, float | None] = {
    "skew_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "alpha_beta": 0.2,
    "adaptive_kl": 0.5,
    "interpolated": None,
}
DEFAULT_BETA: dict[str, float | None] = {"symmetric_kl": 0.9, "generalized_js": 0.5, "alpha_beta": 0.7}
# The least exponent of alpha_beta beside logits narrower than float64.
LEAST_POWER = 1e-4
# How the tail of a `CompressedLogits` teacher enters the loss.
TAILS = ("bucket", "truncate", "renormalize", "sampled")


def checked_options(
    divergence: str,
    alpha: float | Tensor | None,
    beta: float | None,
    temperature: float,
    ce_weight: float,
    ignore_index: int,
    detach_mixture: bool,
) -> DivergenceOptions:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if detach_mixture and divergence != "skew_reverse_kl":
        raise ValueError(f"detach_mixture is an option of skew_reverse_kl, got divergence={divergence!r}.")
    scalar = None if isinstance(alpha, Tensor) else alpha
    if alpha is not None and divergence not in DEFAULT_ALPHA:
        raise ValueError(f"alpha has no meaning for {divergence}; leave it None.")
    if alpha is None and divergence == "interpolated":
        raise ValueError("interpolated needs alpha, the teacher's share t of the logits, in [0, 1]; got None.")
    a = _hyper_parameter(scalar, "alpha", divergence, DEFAULT_ALPHA)
    b = _hyper_parameter(beta, "beta", divergence, DEFAULT_BETA)
    if divergence in ("adaptive_kl", "interpolated"):
        divergence = "forward_kl" if scalar == 1.0 else divergence  # all of the row is head, all of the blend teacher
    elif divergence in ("symmetric_kl", "generalized_js", "alpha_beta"):
        divergence = _limit(divergence, a, b, isinstance(alpha, Tensor))
    temperature = checked_number(temperature, "temperature")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    ce_weight = checked_number(ce_weight, "ce_weight")
    if not 0.0 <= ce_weight < math.inf:
        raise ValueError(f"ce_weight must be finite and not negative, got {ce_weight}.")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}.")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, got {ignore_index}.")
    if not isinstance(detach_mixture, bool):
        raise TypeError(f"detach_mixture must be a bool, got {type(detach_mixture).__name__}.")
    return DivergenceOptions(divergence, a, b, temperature, ce_weight, ignore_index, detach_mixture)


def _hyper_parameter(value: float | None, name: str, divergence: str, defaults: dict[str, float | None]) -> float:
    if value is not None and divergence not in defaults:
        raise ValueError(f"{name} has no meaning for {divergence}; leave it None.")
    number = (defaults.get(divergence) or 0.0) if value is None else checked_number(value, name)
    if divergence == "alpha_beta":
        if not 0.0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {number}.")
    elif not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {number}.")
    return number


def check_powers(options: DivergenceOptions, alpha: float | Tensor | None, dtype: torch.dtype) -> None:
    """That float32 arithmetic has digits for the differences of powers that alpha_beta is made of."""
    if options.divergence != "alpha_beta" or dtype == torch.float64:
        return
    for name, value in (("alpha", 1.0 if isinstance(alpha, Tensor) else options.alpha), ("beta", options.beta)):
        if value < LEAST_POWER:
            raise ValueError(
                f"{name} of alpha_beta must be at least {LEAST_POWER} for {dtype} logits, or 0 in one of the limits "
                f"(1, 0) and (0, 1), got {value}; smaller ones need float64."
            )


def _limit(divergence: str, alpha: float, beta: float, alpha_rows: bool) -> str:
    """The name under which the kernels know the ends of a family, which its own formula does not reach."""
    if divergence != "alpha_beta":
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, divergence)
    if not alpha_rows and (alpha, beta) in ((1.0, 0.0), (0.0, 1.0)):
        return "forward_kl" if beta == 0.0 else "reverse_kl"
    if beta == 0.0 or (alpha == 0.0 and not alpha_rows):
        raise ValueError(
            f"alpha_beta needs alpha > 0 and beta > 0, or one of the limits (1, 0) and (0, 1), got ({alpha}, {beta})."
        )
    return divergence


def checked_number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):  # numbers of NumPy too
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within the range of a float.") from None
