"""The divergences in float64 NumPy, row by row and straight from their definitions: what the CUDA kernels must give.

Written apart from the kernels and from distillm_ext.reference.dense: log-probabilities throughout, no shared helper.
"""

from __future__ import annotations

import numpy as np
from ptx_kernels import DivergenceCase


def log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        shifted = logits - logits.max()
        return shifted - np.log(np.exp(shifted).sum())


def times_log_ratio(log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    """a * log(a / b), 0 where a is 0."""
    a = np.exp(log_a)
    with np.errstate(invalid="ignore"):
        return np.where(a > 0, a * np.where(a > 0, log_a - log_b, 0), 0)


def log_mixture(alpha: float, log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    """log(alpha a + (1 - alpha) b)."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log(alpha) + log_a, np.log(1 - alpha) + log_b)


def adaptive_share(log_p: np.ndarray, log_q: np.ndarray, mu: float) -> float:
    """Weight of the reverse divergence in adaptive_kl; the head by sorting (-log p, id); all of the row at mu = 1, to
    which the rounded masses add up only nearly."""
    order = sorted(range(len(log_p)), key=lambda v: (-log_p[v], v))
    distance, mass, g = np.abs(np.exp(log_p) - np.exp(log_q)), 0.0, [0.0, 0.0]
    for rank, v in enumerate(order):
        mass += np.exp(log_p[v])
        g[0 if rank == 0 or mass <= mu or mu == 1 else 1] += distance[v]
    return g[1] / sum(g) if sum(g) > 0 else 0.5


def blended(student: np.ndarray, teacher: np.ndarray, t: float) -> np.ndarray:
    """Logits of interpolated: (1 - t) student + t teacher, -inf where a side that counts is."""
    return student if t == 0 else teacher if t == 1 else (1 - t) * student + t * teacher


def terms(
    name: str, log_p: np.ndarray, log_q: np.ndarray, alpha: float, beta: float, detach: bool
) -> tuple[float, np.ndarray]:
    """Value of a row, and G_v = q_v * d value / d q_v."""
    p, q = np.exp(log_p), np.exp(log_q)
    forward, reverse = times_log_ratio(log_p, log_q), times_log_ratio(log_q, log_p)
    if name == "forward_kl":
        return forward.sum(), -p
    if name == "reverse_kl":
        return reverse.sum(), reverse + q
    if name == "symmetric_kl":
        return ((1 - beta) * forward + beta * reverse).sum(), -(1 - beta) * p + beta * (reverse + q)
    if name == "adaptive_kl":
        share = adaptive_share(log_p, log_q, alpha)
        sides = {"forward_kl": 1 - share, "reverse_kl": share}
        parts = [(w, terms(side, log_p, log_q, alpha, beta, detach)) for side, w in sides.items() if w > 0]
        return sum(w * value for w, (value, _) in parts), sum(w * g for w, (_, g) in parts)
    if name == "interpolated":
        log_t = log_softmax(blended(log_q, log_p, alpha))
        return times_log_ratio(log_t, log_q).sum(), -np.exp(log_t)
    if name == "total_variation":
        return 0.5 * np.abs(p - q).sum(), 0.5 * q * np.sign(q - p)
    if name == "alpha_beta":
        bracket = p**alpha * q**beta - (alpha * p ** (alpha + beta) + beta * q ** (alpha + beta)) / (alpha + beta)
        return -bracket.sum() / (alpha * beta), q**beta * (q**alpha - p**alpha) / alpha
    if name == "token_adaptive":
        w = p / np.maximum(p + q, 1e-300)
        return (w * forward + (1 - w) * reverse).sum(), -w * p + (1 - w) * (reverse + q)
    if name == "generalized_js":
        log_m = log_mixture(beta, log_p, log_q)
        of_q = times_log_ratio(log_q, log_m)
        return (beta * times_log_ratio(log_p, log_m) + (1 - beta) * of_q).sum(), (1 - beta) * of_q
    with np.errstate(invalid="ignore"):
        if name == "skew_kl":
            log_m = log_mixture(alpha, log_p, log_q)
            return times_log_ratio(log_p, log_m).sum(), -(1 - alpha) * np.where(p > 0, np.exp(log_p + log_q - log_m), 0)
        assert name == "skew_reverse_kl"
        log_m = log_mixture(alpha, log_q, log_p)
        value = times_log_ratio(log_q, log_m)
        q_over_m = np.where(q > 0, np.exp(log_q - log_m), 0)
        return value.sum(), value + q * (1 - (0 if detach else alpha) * q_over_m)


def padded(logits: np.ndarray, vocab: int) -> np.ndarray:
    return np.concatenate([logits.astype(np.float64), np.full(vocab - len(logits), -np.inf)])


def row_reference(case: DivergenceCase, row: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and gradient of one row, whatever the inputs, and the magnitude of what each gradient is a difference of."""
    vocab = case.student.shape[1]
    weight = 1.0 if case.weight is None else float(case.weight[row])
    label = None if case.labels is None else int(case.labels[row])
    cap = np.inf if case.cap is None else float(case.cap[row])
    alpha = case.alpha if case.alpha_rows is None else float(case.alpha_rows[row])
    if weight == 0 or label == case.ignore_index:
        return 0.0, np.zeros(vocab), np.zeros(vocab)
    widest = max(vocab, case.teacher.shape[1])
    student, teacher = padded(case.student[row], widest), padded(case.teacher[row], widest)
    log_q, log_p = log_softmax(student / case.temperature), log_softmax(teacher / case.temperature)
    legal = not np.isnan([weight, cap, log_q.sum(), log_p.sum()]).any() and student.max() < np.inf > teacher.max()
    if "skew" in case.divergence or case.divergence in ("adaptive_kl", "interpolated"):
        legal = legal and 0 <= alpha <= 1
    if case.divergence == "alpha_beta":
        legal = legal and 0.999e-4 < alpha < np.inf
    if case.divergence == "interpolated" and legal:  # sides without a common entry have no blend
        legal = blended(student, teacher, alpha).max() > -np.inf
    legal = legal and cap >= 0
    if case.ce_weight:
        legal = legal and 0 <= label < vocab
    if not legal:
        return np.nan, np.full(vocab, np.nan), np.zeros(vocab)

    value, g = terms(case.divergence, log_p, log_q, alpha, case.beta, case.detach_mixture)
    q, gradient, magnitude = np.exp(log_q), np.zeros(widest), np.zeros(widest)
    if value <= cap and value < np.inf:
        gradient = (g - q * g.sum()) / case.temperature
        magnitude = (np.abs(g) + q * np.abs(g).sum()) / case.temperature
    loss = min(value, cap)
    if case.ce_weight:
        log_unit = log_softmax(student)
        loss -= case.ce_weight * log_unit[label]
    if case.ce_weight and log_unit[label] > -np.inf:  # an infinite cross-entropy has no gradient
        gradient += case.ce_weight * (np.exp(log_unit) - (np.arange(widest) == label))
        magnitude += case.ce_weight * (np.exp(log_unit) + (np.arange(widest) == label))
    return weight * loss, weight * gradient[:vocab], abs(weight) * magnitude[:vocab]


def reference(case: DivergenceCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses [R], gradients [R, Vs] and their magnitudes [R, Vs], to which rounding errors are proportional."""
    losses, gradients, magnitudes = zip(*(row_reference(case, row) for row in range(len(case.student))), strict=True)
    return np.array(losses), np.stack(gradients), np.stack(magnitudes)
