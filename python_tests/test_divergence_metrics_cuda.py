"""Entropies and top-1 agreement, which the CUDA kernel of `divergence` gives along with the divergence."""

from __future__ import annotations

import numpy as np
import pytest
from divergence_oracle import log_softmax, padded
from ptx_kernels import DivergenceCase, launch_divergence
from test_divergence_cuda import BF16, F32, logits
from tiers import full


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def expected_metrics(case: DivergenceCase) -> np.ndarray:
    vocab = max(case.student.shape[1], case.teacher.shape[1])
    rows = []
    for student, teacher in zip(case.student, case.teacher, strict=True):
        student, teacher = padded(student, vocab), padded(teacher, vocab)
        entropies = []
        for log_p in (log_softmax(teacher / case.temperature), log_softmax(student / case.temperature)):
            entropies.append(-(np.exp(log_p) * np.where(np.isinf(log_p), 0, log_p)).sum())
        rows.append([*entropies, float(student.argmax() == teacher.argmax())])
    return np.array(rows)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("staged", [0, 1, None])
@pytest.mark.parametrize("arch", ["sm_90", *full("sm_80")])
def test_ties_masked_rows_and_rows_without_a_divergence(dtype, staged, arch, rng):
    student, teacher = logits(rng, 6, 517, dtype), logits(rng, 6, 517, dtype)
    student[0, 100] = teacher[0, 100] = teacher[0, 400] = 40  # of equal largest logits the first counts,
    student[1, 8] = teacher[1, 8] = teacher[1, 9] = 20  # in one thread's chunk too
    student[2, 5:] = -np.inf
    teacher[4, 3] = np.nan
    labels = np.array([1, 2, 3, -100, 4, 517])  # row 5: a label that makes its loss NaN
    for in_place, temperature in ((False, 1.0), (True, 2.0)):
        case = DivergenceCase(
            student.copy(), teacher, labels=labels, ce_weight=0.5, temperature=temperature, in_place=in_place,
            need_metrics=True, staged_turns=staged,
        )  # fmt: skip
        expected = expected_metrics(case)[:3]
        result = launch_divergence(case, arch, threads=32, seed=3)
        np.testing.assert_allclose(result.metrics[:3], expected, rtol=2e-5, atol=2e-6)
        assert expected[0, 2] == expected[1, 2] == 1
        assert (result.metrics[3] == 0).all() and np.isnan(result.metrics[4:]).all()
    case = DivergenceCase(student, teacher, need_metrics=True, need_gradient=False)
    np.testing.assert_allclose(launch_divergence(case).metrics[0, 2], 1)


@pytest.mark.parametrize("divergence", ["skew_kl", "adaptive_kl", *full("forward_kl", "interpolated")])
def test_members_clusters_and_unequal_vocabularies(divergence, rng):
    student, teacher = logits(rng, 8, 333, BF16), logits(rng, 8, 301, BF16)
    student[0], teacher[0] = 0, 0  # the first of equal logits
    student[1, [5, 200]], teacher[1, [5, 100]] = 30, 30  # first at 5 on both sides
    student[2, [4, 5]], teacher[2, 5] = 30, 30
    student[3, 7:], teacher[3, 7:] = -np.inf, -np.inf
    student[6, 0] = np.nan
    weight = np.array([1, 1, 2, 1, 1, 0, 1, 1], np.float32)
    for cluster, options in ((1, {}), (2, {"temperature": 2.0}), (4, {"staged_turns": 0, "need_gradient": False})):
        case = DivergenceCase(student, teacher, divergence, weight=weight, need_metrics=True, **options)
        result = launch_divergence(case, threads=32, cluster=cluster, seed=1)
        expected = expected_metrics(case)
        expected[5], expected[6] = 0, np.nan
        np.testing.assert_allclose(result.metrics, expected, rtol=2e-5, atol=2e-5)


def test_metrics_cost_no_further_reads(rng):
    case = DivergenceCase(logits(rng, 1, 4096, BF16), logits(rng, 1, 4096, BF16), staged_turns=1)
    plain = launch_divergence(case, threads=64).counters.load_bytes
    case.need_metrics = True
    assert launch_divergence(case, threads=64).counters.load_bytes == plain
