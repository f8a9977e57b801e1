"""The CUDA kernel of `divergence` beyond a functor per entry: interpolated, adaptive_kl, vocab_size."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_kernels import DivergenceCase, launch_divergence
from test_divergence_cuda import BF16, F16, F32, check, logits, unaligned
from tiers import full

MEMBERS = ("adaptive_kl", "interpolated")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(29)


@pytest.mark.parametrize("arch,cluster", [("sm_90", 2), pytest.param("sm_80", 1, marks=pytest.mark.slow), ("sm_90", 4)])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), *full((F16, F16), (BF16, F32))], ids=str)
@pytest.mark.parametrize("divergence", MEMBERS)
def test_dtypes_and_sizes(arch, cluster, dtypes, divergence, rng):
    # The gradient of a single entry is 0 to a rounding of its scaled logit, which float16 may show.
    for seed, vocab in enumerate((1 if dtypes[0] == F32 else 2, 31, 517)):
        case = DivergenceCase(logits(rng, 2, vocab, dtypes[0]), logits(rng, 2, vocab, dtypes[1]), divergence)
        for case.staged_turns in (None, 1):
            check(case, arch, threads=32, cluster=cluster, seed=seed)


@pytest.mark.parametrize("divergence", MEMBERS)
def test_parameters_of_each_row(divergence, rng):
    case = DivergenceCase(logits(rng, 8, 300, F32), logits(rng, 8, 310, F32), divergence, temperature=1.5)
    case.teacher[:, 300:] = -np.inf
    case.alpha_rows = np.array([0, 0.1, 0.5, 0.9, 1, -0.1, 1.1, np.nan], np.float32)
    case.labels, case.ce_weight = np.arange(8) * 30, 0.3
    result = check(case, cluster=2)
    assert np.isnan(result.loss[5:]).all() and np.isfinite(result.loss[:5]).all()


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_head_of_peaked_and_flat_rows(mu, dtype, rng):
    teacher = logits(rng, 6, 203, dtype)
    teacher[0] = 0  # all alike: the head is the first ids
    teacher[1] = np.repeat([3, 1, -2, -5, -5.5, -70, 2], 29)  # ties, on both sides of 0
    teacher[2, 77] = 40  # one entry has all the mass
    teacher[3] = rng.integers(-2, 3, 203)
    teacher[4, 3:] = -np.inf
    teacher[5] = 1e4 + np.arange(203) % 7
    check(DivergenceCase(logits(rng, 6, 203, dtype), teacher, "adaptive_kl", alpha=mu), cluster=2, threads=32, seed=2)


def test_head_of_nearly_equal_logits(rng):
    """Few of many that are alike are the head; in place too."""
    teacher = (rng.standard_normal((2, 700)) * 1e-3).astype(F32)
    teacher[1] = 0
    for in_place in (False, True):
        case = DivergenceCase(logits(rng, 2, 700, F32), teacher, "adaptive_kl", alpha=0.04, in_place=in_place)
        check(case, threads=32, seed=1)


def test_head_of_a_row_in_parts(rng):
    """Every round of the search reads again what is not staged; with some turns staged and some kept."""
    for staged, kept in ((None, None), (3, 1), (0, 0)):
        case = DivergenceCase(
            logits(rng, 1, 1501, BF16), logits(rng, 1, 1501, BF16, 0.1), "adaptive_kl", staged_turns=staged,
            kept_turns=kept,
        )  # fmt: skip
        check(case, threads=32, cluster=2, seed=3)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_adaptive_kl_where_both_sides_are_masked(mu, rng):
    """Probabilities of 0 on both sides contribute nothing, and get no gradient; at mu = 1 also where the student has
    one."""
    student, teacher = logits(rng, 2, 301, BF16), logits(rng, 2, 301, BF16)
    student[0, ::3] = teacher[0, ::3] = -np.inf
    if mu == 1:
        teacher[1, ::2] = -np.inf
    for kept in (None, 0):
        case = DivergenceCase(student, teacher, "adaptive_kl", alpha=mu, kept_turns=kept)
        result = check(case, cluster=2, threads=32)
        assert np.isfinite(result.loss).all() and (result.gradient[0, ::3] == 0).all()


def test_adaptive_kl_of_identical_and_masked_rows(rng):
    student = logits(rng, 3, 203, F32)
    teacher = student.copy()
    student[1, ::3] = teacher[2, ::3] = -np.inf
    result = check(DivergenceCase(student, teacher, "adaptive_kl"))
    assert result.loss[0] == 0 and np.isinf(result.loss[1:]).all()


def test_interpolated_of_far_apart_and_masked_rows(rng):
    student, teacher = logits(rng, 4, 203, F32), logits(rng, 4, 203, F32)
    student[0] += 1e4
    teacher[0] -= 1e4
    student[1, ::3] = -np.inf
    teacher[2, ::3] = -np.inf
    for t in (0.0, 0.3, 1.0):
        case = DivergenceCase(student, teacher, "interpolated", alpha=t)
        if t == 1:
            student[1], teacher[0] = student[3], teacher[3]
        check(case, seed=1)


@pytest.mark.parametrize("staged", [None, 1])
@pytest.mark.parametrize("apart", [120, 500, 1e4])
def test_interpolated_of_sides_without_overlap(apart, staged, rng):
    """The sum of exponentials of the blend underflows, and the pass is made once more."""
    student, teacher = logits(rng, 3, 333, F32), logits(rng, 3, 333, F32)
    student[:, ::2] += apart
    teacher[:, 1::2] += apart
    student[1, 1::2] -= 70
    student[2, ::3] = teacher[2, ::5] = -np.inf
    for in_place in (False, True):
        case = DivergenceCase(student.copy(), teacher, "interpolated", staged_turns=staged, in_place=in_place)
        assert np.isfinite(check(case, cluster=2, threads=32, seed=1).loss).all()


def test_logits_at_the_ends_of_the_range(rng):
    """The product with the scale is not a float: statistics from the differences to the largest logit."""
    student, teacher = logits(rng, 4, 203, F32), logits(rng, 4, 203, F32)
    lowest = np.finfo(np.float32).min
    student[0], teacher[1] = lowest, -lowest
    student[2, :100], student[2, 100:] = -lowest, lowest
    student[3] += 3e4
    case = DivergenceCase(student, teacher, temperature=2.0, labels=np.arange(4), ce_weight=0.5)
    for case.temperature in (0.25, 2.0):
        check(case, cluster=2, threads=32)
    case.teacher[0, 7] = np.inf
    assert np.isnan(check(case, cluster=2).loss[0])


@pytest.mark.parametrize("divergence", MEMBERS)
def test_unusable_rows_stay_alone(divergence, rng):
    student, teacher = logits(rng, 4, 133, F32), logits(rng, 4, 133, F32)
    student[0], teacher[1], student[2, 50] = -np.inf, -np.inf, np.nan
    result = check(DivergenceCase(student, teacher, divergence), cluster=2)
    assert np.isnan(result.loss[:3]).all() and np.isfinite(result.loss[3])


@pytest.mark.parametrize("divergence", MEMBERS)
def test_in_place_and_independent_of_the_schedule(divergence, rng):
    student, teacher = logits(rng, 2, 1033, BF16), np.round(logits(rng, 2, 1033, BF16).astype(np.float32)).astype(BF16)
    results = []
    for seed in range(3):
        case = DivergenceCase(student.copy(), teacher, divergence, in_place=True)
        results.append(check(case, cluster=4, threads=32, seed=seed))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


@pytest.mark.parametrize("in_place", [False, True])
def test_vocab_size(in_place, rng):
    """Entries beyond it do not count, and their gradient is 0."""
    student, teacher = logits(rng, 3, 203, BF16), logits(rng, 3, 210, BF16)
    weight = np.array([1, 0, 1], np.float32)
    limited = DivergenceCase(student[:, :190].copy(), teacher[:, :190].copy(), weight=weight)
    expected = check(limited)
    student[2, 200], teacher[2, 201] = np.nan, np.inf
    case = DivergenceCase(unaligned(student, 3), teacher, weight=weight, vocab_size=190, in_place=in_place)
    result = launch_divergence(case, cluster=2, threads=32)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)
    np.testing.assert_allclose(
        result.gradient[:, :190].astype(np.float32), expected.gradient.astype(np.float32), rtol=2e-2, atol=1e-6
    )
    assert (result.gradient[:, 190:] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_vocab_size_in_blocks_of_rows(dtype, rng):
    """In place the entries from vocab_size on become 0 in every row, also in one that is left out; the rows between the
    blocks stay as they are."""
    whole = logits(rng, 8, 203, dtype).reshape(2, 4, 203)
    before, blocks = whole.copy(), whole[:, :3]
    weight = np.array([1, 0, 1, 1, np.nan, 1], np.float32)
    case = DivergenceCase(
        blocks.reshape(6, 203), logits(rng, 6, 210, dtype), weight=weight, vocab_size=101, in_place=True,
        student_blocks=blocks,
    )  # fmt: skip
    launch_divergence(case, cluster=2, threads=32, seed=2)
    assert (whole[:, :3, 101:] == 0).all() and (whole[0, 1] == 0).all()
    assert np.isnan(whole[1, 1, :101]).all() and (whole[0, 0, :101] != before[0, 0, :101]).mean() > 0.9
    np.testing.assert_array_equal(whole[:, 3], before[:, 3])
