"""The CUDA kernel of `divergence`, executed from its PTX by ptxsim, against the float64 oracle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from divergence_cases import ALWAYS_FINITE
from divergence_oracle import reference
from ptx_kernels import FUNCTORS, DivergenceCase, launch_divergence
from tiers import full

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, BF16)]
DIVERGENCES = list(FUNCTORS)
ODD_SIZES = (1, 2, 7, 31, 1023, 4099)
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}  # of one stored gradient
SUBNORMAL = {F32: 1e-38, BF16: 1e-38, F16: 2.0**-24}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def logits(rng, rows: int, vocab: int, dtype, spread: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((rows, vocab)) * spread).astype(dtype)


def unaligned(array: np.ndarray, entries: int, stride: int | None = None) -> np.ndarray:
    """The same values `entries` past an aligned address, rows `stride` apart."""
    rows, columns = array.shape
    stride = stride or columns
    storage = np.zeros(entries + rows * stride, array.dtype)
    view = storage[entries:].reshape(rows, stride)[:, :columns]
    view[...] = array
    return view


def check(case: DivergenceCase, arch: str = "sm_90", **options):
    """Launches and compares every row: NaN and infinities in the same places, values and gradients close."""
    loss, gradient, magnitude = reference(case)  # first: an in-place launch overwrites the student
    dtype = case.student.dtype
    result = launch_divergence(case, arch, **options)
    np.testing.assert_allclose(result.loss, loss, rtol=2e-5, atol=3e-6)
    if result.gradient is not None:
        got = result.gradient.astype(np.float64)
        precision = 2e-5 if case.divergence == "alpha_beta" else 5e-6  # powers scale the rounding of the logarithms
        allowed = ROUNDING[dtype] * np.abs(gradient) + precision * magnitude + SUBNORMAL[dtype] + 1e-15
        assert (np.isnan(got) == np.isnan(gradient)).all()
        wrong = np.abs(got - gradient) > allowed
        assert not wrong.any(), (np.argwhere(wrong)[:5], got[wrong][:5], gradient[wrong][:5])
    return result


@pytest.mark.parametrize("arch", ["sm_90", *full("sm_80")])
@pytest.mark.parametrize("student,teacher", PAIRS, ids=lambda dtype: dtype.name)
def test_dtypes_sizes_and_schedules(arch, student, teacher, rng):
    for seed, vocab in enumerate(ODD_SIZES):
        case = DivergenceCase(logits(rng, 3, vocab, student), logits(rng, 3, vocab, teacher))
        for threads in (32, 160):
            check(case, arch, threads=threads, seed=seed)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences(divergence, rng):
    student, teacher = logits(rng, 3, 517, F32), logits(rng, 3, 517, F32)
    for temperature in (1.0, 2.0, 0.5):
        for detach in (False, True):
            check(DivergenceCase(student, teacher, divergence, temperature=temperature, detach_mixture=detach))
    for alpha in (0.0, 0.3, 0.8, 1.0) if "skew" in divergence else ():
        check(DivergenceCase(student, teacher, divergence, alpha=alpha))


@pytest.mark.parametrize("arch", ["sm_80", *full("sm_100", "sm_120")])
def test_other_architectures(arch, rng):
    case = DivergenceCase(logits(rng, 2, 1023, BF16), logits(rng, 2, 1023, BF16))
    for seed in (0, 5):
        check(case, arch, threads=64, seed=seed)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, BF16), (F16, BF16)], ids=str)
@pytest.mark.parametrize("staged", [0, 1, None])
def test_layouts(dtypes, staged, rng):
    """Rows that start anywhere: both sides in phase, each alone out of phase, odd row strides."""
    student, teacher = logits(rng, 3, 1003, dtypes[0]), logits(rng, 3, 1003, dtypes[1])
    offsets = [(0, 0, None, None), (1, 1, None, None), (1, 0, None, None), (0, 5, None, None), (3, 2, 1005, None),
               (0, 0, 1008, 1008), (2, 7, 1010, 1031)]  # fmt: skip
    for seed, (at_student, at_teacher, student_stride, teacher_stride) in enumerate(offsets):
        case = DivergenceCase(
            unaligned(student, at_student, student_stride),
            unaligned(teacher, at_teacher, teacher_stride),
            staged_turns=staged,
        )
        check(case, seed=seed)
        case.need_gradient = False
        check(case, seed=seed)


@pytest.mark.parametrize("vocabs", [(1000, 1030), (1030, 1000), (9, 700), (700, 9), (1, 3)], ids=str)
@pytest.mark.parametrize("divergence", ALWAYS_FINITE)
@pytest.mark.pairwise
def test_unequal_vocabularies(vocabs, divergence, rng):
    case = DivergenceCase(logits(rng, 3, vocabs[0], F32), logits(rng, 3, vocabs[1], F32), divergence)
    check(case)
    case.student = unaligned(case.student, 3)
    check(case, threads=32)
    case.staged_turns = 1
    check(case)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("divergence", ALWAYS_FINITE)
@pytest.mark.pairwise
def test_masked_columns(dtype, divergence, rng):
    student, teacher = logits(rng, 4, 203, dtype), logits(rng, 4, 203, dtype)
    student[0, ::3] = teacher[1, ::2] = -np.inf
    student[2, 1:] = teacher[2, :-1] = -np.inf  # one finite column each, and not the same one
    student[3, 40:] = teacher[3, 40:] = -np.inf
    result = check(DivergenceCase(student, teacher, divergence))
    if divergence == "interpolated":  # row 2 has no blend, so all of it is NaN
        assert np.isnan(result.gradient[2].astype(np.float32)).all()
        result.gradient[2] = 0
    assert (result.gradient[np.isinf(student.astype(np.float32))] == 0).all()


def test_infinite_divergence(rng):
    student, teacher = logits(rng, 3, 100, F32), logits(rng, 3, 100, F32)
    student[1, 7] = teacher[2, 7] = -np.inf
    for divergence, row in (("forward_kl", 1), ("reverse_kl", 2)):
        case = DivergenceCase(student, teacher, divergence)
        result = check(case)
        assert result.loss[row] == np.inf and (result.gradient[row] == 0).all()
        case.cap = np.full(3, 0.5, np.float32)
        assert check(case).loss[row] == 0.5
        case.labels, case.ce_weight = np.array([3, 4, 5]), 0.5
        check(case)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_unusable_rows_stay_alone(divergence, rng):
    student, teacher = logits(rng, 6, 133, F32), logits(rng, 6, 133, F32)
    student[0] = -np.inf
    teacher[1] = -np.inf
    student[2, 50] = np.nan
    teacher[3, 132] = np.nan
    student[4, 0] = np.inf
    result = check(DivergenceCase(student, teacher, divergence), seed=3)
    assert np.isfinite(result.loss[5]) and np.isnan(result.loss[:5]).all()


def test_skipped_rows_are_not_read(rng):
    student, teacher = logits(rng, 4, 333, F32), logits(rng, 4, 333, F32)
    student[:2], teacher[:2] = np.nan, np.inf
    case = DivergenceCase(student, teacher)
    case.labels = np.array([-100, 5, 6, 7])
    case.weight = np.array([1, 0, 2.5, -1], np.float32)
    check(case)
    case.labels, case.weight = np.array([-7, -7, -7, -7]), None
    case.ignore_index = -7
    result = check(case)
    assert result.counters.buffers[0].load_bytes == result.counters.buffers[1].load_bytes == 0


def test_side_inputs_of_each_row(rng):
    nan = np.nan
    case = DivergenceCase(logits(rng, 8, 250, F32), logits(rng, 8, 250, F32))
    case.alpha_rows = np.array([0, 0.1, 0.9, 1, -0.1, 1.5, nan, 0.5], np.float32)
    case.weight = np.array([1, 2, 0.5, -3, 1, 1, 1, nan], np.float32)
    result = check(case)
    assert np.isnan(result.loss[4:]).all() and np.isfinite(result.loss[:4]).all()
    case.alpha_rows = None
    case.weight[7] = 1
    case.cap = np.array([0.1, 10, 0, np.inf, 0.1, -1, nan, 0.2], np.float32)
    result = check(case)
    assert (result.gradient[[0, 2]] == 0).all() and np.isnan(result.loss[5:7]).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cross_entropy(temperature, dtype, rng):
    case = DivergenceCase(logits(rng, 7, 301, dtype), logits(rng, 7, 295, dtype), temperature=temperature)
    case.labels = np.array([0, 300, 297, 17, -100, 301, -1])
    case.ce_weight = 0.7
    case.weight = np.array([1, 2, 3, 1, 1, 1, 1], np.float32)
    case.cap = np.array([9, 9, 9, 0.01, 9, 9, 9], np.float32)
    for staged in (0, None):
        case.staged_turns = staged
        result = check(case, seed=2)
    assert np.isnan(result.loss[5:]).all() and result.loss[4] == 0
    case.ce_weight = 0.0  # then labels only say which rows count
    assert np.isfinite(check(case).loss).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_infinite_cross_entropy_has_no_gradient(temperature, rng):
    case = DivergenceCase(logits(rng, 3, 301, F32), logits(rng, 3, 301, F32), temperature=temperature)
    case.labels, case.ce_weight = np.array([3, 7, 300]), 0.5
    case.student[1, 7] = case.student[2, 300] = case.teacher[2, 300] = -np.inf
    result = check(case)
    assert np.isinf(result.loss).tolist() == [False, True, True] and (result.gradient[[1, 2], [7, 300]] == 0).all()


def test_powers_of_each_row(rng):
    """alpha_beta: exponents that leave no digits are refused, as infinite ones are."""
    case = DivergenceCase(logits(rng, 5, 250, F32), logits(rng, 5, 250, F32), "alpha_beta")
    case.alpha_rows = np.array([0.1, 1, 1e-5, np.inf, 0], np.float32)
    assert np.isnan(check(case).loss).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("staged", [0, 1, None])
def test_in_place(staged, rng):
    for offset, temperature in ((0, 1.0), (3, 2.0)):
        case = DivergenceCase(
            unaligned(logits(rng, 3, 517, BF16), offset), logits(rng, 3, 517, BF16), in_place=True,
            staged_turns=staged, temperature=temperature, labels=np.array([5, -100, 516]), ce_weight=0.5,
        )  # fmt: skip
        for seed in (0, 4):
            case.student[...] = logits(rng, 3, 517, BF16)
            check(case, seed=seed)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("vocab", [517, 520])
def test_blocks_of_rows(vocab, in_place, rng):
    """Rows with two strides, as in logits[:, :-1]; in place the rows between the blocks stay as they are."""
    whole = logits(rng, 8, vocab, BF16).reshape(2, 4, vocab)
    before, blocks = whole.copy(), whole[:, :3]
    rows = blocks.reshape(6, vocab)  # a copy: the oracle's
    case = DivergenceCase(rows, logits(rng, 6, vocab, BF16), student_blocks=blocks, in_place=in_place)
    loss, gradient, magnitude = reference(case)
    result = launch_divergence(case)
    np.testing.assert_allclose(result.loss, loss, rtol=2e-5, atol=3e-6)
    got = result.gradient.reshape(6, vocab).astype(np.float64)
    assert (np.abs(got - gradient) <= ROUNDING[BF16] * np.abs(gradient) + 5e-6 * magnitude + 1e-15).all()
    np.testing.assert_array_equal(whole if not in_place else whole[:, 3], before if not in_place else before[:, 3])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [F32, *full(BF16)], ids=str)
def test_identical_inputs(divergence, dtype, rng):
    """Exactly 0, but where the teacher is a blend with a softmax of its own."""
    student = logits(rng, 2, 20011, dtype)
    for temperature in (1.0, 3.0):
        case = DivergenceCase(student, student.copy(), divergence, temperature=temperature)
        result = launch_divergence(case, threads=256, cluster=2)
        assert (np.abs(result.loss) <= (1e-6 if divergence == "interpolated" else 0)).all()
        assert np.abs(result.gradient.astype(np.float32)).max() <= 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits(divergence, rng):
    rows = np.array([[120, 0, -120], [-120, 0, 120], [1e4, 9999, -1e4], [-1e4, 1e4, 0], [1e-3, 1e4, 1e4]], np.float32)
    check(DivergenceCase(rows, rows[::-1].copy(), divergence))
    large = (1e4 + rng.standard_normal((2, 400)) * 4).astype(np.float32)
    check(DivergenceCase(large, large[::-1] - 2e4, divergence))
    lowest = np.finfo(np.float32).min
    masked = logits(rng, 2, 50, F32)
    masked[0, 3:] = masked[1] = lowest
    check(DivergenceCase(masked, logits(rng, 2, 50, F32), "skew_kl"))


def test_independent_of_the_schedule(rng):
    case = DivergenceCase(logits(rng, 3, 2051, F32), logits(rng, 3, 2051, F32))
    results = [launch_divergence(case, threads=160, seed=seed) for seed in range(4)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


def test_counted_traffic(rng):
    """Each logit is read once where the row is staged, three times where it is not; each gradient is written once."""
    rows, vocab, threads = 2, 4096, 128
    entries = rows * vocab
    first_logits = 4 * rows * threads // 32  # loaded by one lane of every warp
    case = DivergenceCase(logits(rng, rows, vocab, BF16), logits(rng, rows, vocab, BF16))
    for staged, reads in ((None, 1), (2, 2), (0, 3)):
        case.staged_turns = staged
        counters = check(case, threads=threads).counters
        assert counters.load_bytes == 4 * entries * reads + first_logits
        assert counters.store_bytes == 2 * entries + 4 * rows
    case.staged_turns, case.need_gradient = None, False
    counters = check(case, threads=threads).counters
    assert (counters.load_bytes, counters.store_bytes) == (4 * entries + first_logits, 4 * rows)
    accesses = {site.text.split()[0] for site in counters.sites if site.access == "load global"}
    assert "ld.global.v4.u32" in accesses
