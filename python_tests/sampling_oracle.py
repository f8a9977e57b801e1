"""What `sample_tokens` should do, in float64 with full sorts: kept set, probabilities, and how clear the case is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rule:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def options(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Expected:
    kept: np.ndarray  # [V] bool
    probability: np.ndarray  # [V], under the filtered distribution
    margin: float  # distance of the nearest cumulative mass from top_p, of the nearest ratio from min_p
    sure: np.ndarray  # [V] bool: kept where top_p and min_p are 1e-6 stricter
    possible: np.ndarray  # [V] bool: kept where they are 1e-6 laxer


def adjusted(logits: np.ndarray, penalty: float = 1.0, previous=(), banned=None) -> np.ndarray:
    """Logits in float64 after repetition penalty and mask."""
    z = np.array(logits, dtype=np.float64)
    for token in {int(t) for t in previous if 0 <= t < len(z)}:
        z[token] = z[token] * penalty if z[token] < 0 else z[token] / penalty
    if banned is not None:
        z[np.asarray(banned)] = -np.inf
    return z


def expected(z: np.ndarray, rule: Rule) -> Expected:
    """z: float64 logits of one row with a finite one, temperature > 0."""
    top_p, min_p = float(np.float32(rule.top_p)), float(np.float32(rule.min_p))
    weight = np.exp((z - z.max()) / float(np.float32(rule.temperature)))
    kept, margin = _kept(weight, z, rule.top_k, top_p, min_p)
    sure, _ = _kept(weight, z, rule.top_k, top_p - 1e-6 if top_p < 1 else 1, min_p + 1e-6 if min_p else 0)
    possible, _ = _kept(weight, z, rule.top_k, top_p + 1e-6, max(min_p - 1e-6, 0))
    probability = np.where(kept, weight, 0) / weight[kept].sum()
    return Expected(kept, probability, margin, sure, possible)


def _kept(weight: np.ndarray, z: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[np.ndarray, float]:
    order = np.lexsort((np.arange(len(z)), -z))  # larger logits first, lower ids first among equals
    if top_k:
        order = order[:top_k]
    margin = np.inf
    if top_p < 1:
        cumulative = np.cumsum(weight[order]) / weight[order].sum()
        margin = np.abs(cumulative - top_p).min()
        order = order[: int(np.searchsorted(cumulative, top_p)) + 1]
    if min_p > 0:
        below = weight[order][weight[order] < 1]  # the maximum itself is kept exactly
        margin = min(margin, np.abs(below - min_p).min(initial=np.inf))
        order = order[weight[order] >= min_p]
    kept = np.zeros(len(z), bool)
    kept[order] = True
    return kept & (weight > 0), margin


def bits_at(uniform: np.ndarray) -> np.ndarray:
    """The int64 random bits that stand for uniforms in (0, 1)."""
    return np.array([min(int(float(u) * 2.0**64), 2**64 - 1) for u in uniform], dtype=np.uint64).view(np.int64)


def centres(case: Expected, least: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the kept set with more than `least` probability, and bits in the middle of their share of the draw."""
    cumulative = np.cumsum(case.probability)
    tokens = np.flatnonzero(case.probability > least)
    return tokens, bits_at(cumulative[tokens] - case.probability[tokens] / 2)
