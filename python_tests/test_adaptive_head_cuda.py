"""adaptive_kl on CUDA: the radix selection of the teacher's head."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import ptxsim
import pytest
from divergence_oracle import log_softmax
from ptx_kernels import DivergenceCase, divergence_module, launch_divergence
from test_divergence_cluster_cuda import BLOCK_BARRIER, CLUSTER_BARRIER
from test_divergence_cuda import BF16, F16, F32, check, logits
from tiers import full


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def adaptive(student: np.ndarray, teacher: np.ndarray, **options) -> DivergenceCase:
    return DivergenceCase(student, teacher, "adaptive_kl", **options)


def reads(case: DivergenceCase, **options) -> float:
    """How often the teacher's logits come from memory; checked against the oracle."""
    counters = check(case, **options).counters
    return counters.buffers[1].load_bytes / case.teacher.nbytes


@pytest.mark.parametrize("spread", [0.03, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [F32, BF16, *full(F16)], ids=str)
def test_rows_are_read_once(spread, dtype, rng):
    """Every round takes the logits from shared memory, in flat rows and in peaked ones."""
    for mu, vocab in ((0.5, 2007), (0.05, 1024), (0.95, 1203)):
        case = adaptive(logits(rng, 1, vocab, dtype), logits(rng, 1, vocab, dtype, spread), alpha=mu)
        assert reads(case, threads=32, cluster=2, seed=1) < 1.1


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads_and_blocks(dtype, rng):
    """Equal logits on both sides of the boundary, whose ids lie in several blocks."""
    teacher = (np.round(logits(rng, 1, 1033, F32) * 2) / 2).astype(dtype)
    student = logits(rng, 1, 1033, dtype)
    for cluster, threads in ((1, 32), (1, 160), (4, 64), (8, 32)):
        check(adaptive(student, teacher), threads=threads, cluster=cluster, seed=5)


@pytest.mark.parametrize("vocab,mu,inside", [(2, 0.5, 1), (4, 0.25, 1), (256, 0.5, 128), (1024, 0.75, 768)])
def test_exact_among_equal_logits(vocab, mu, inside, rng):
    """The mass of the head is exactly mu: its last entry still belongs to it."""
    student, teacher = logits(rng, 1, vocab, F32, 1.0), np.full((1, vocab), -3.25, F32)
    result = launch_divergence(adaptive(student, teacher, alpha=mu), threads=32, cluster=2, seed=1)
    log_p, log_q = (log_softmax(side[0].astype(np.float64)) for side in (teacher, student))
    p, q = np.exp(log_p), np.exp(log_q)
    gap = np.abs(p - q)
    share = gap[inside:].sum() / gap.sum()
    expected = (1 - share) * (p * (log_p - log_q)).sum() + share * (q * (log_q - log_p)).sum()
    np.testing.assert_allclose(result.loss, expected, rtol=2e-6)


@pytest.mark.parametrize("mu", [0.3, *full(1e-6, 1 - 2.0**-24)])
def test_long_row_of_equal_logits(mu, rng):
    """Ids of three digits; for mu close to 0 and 1 too."""
    teacher = np.full((1, 70001), 2.5, BF16)
    teacher[0, :40000] = -1.0
    check(adaptive(logits(rng, 1, 70001, BF16, 1.0), teacher, alpha=mu), threads=96, cluster=8)


def test_rows_of_other_offsets(rng):
    """Far from 0, at other temperatures, masked in part."""
    student, teacher = logits(rng, 6, 1033, F32), logits(rng, 6, 1033, F32, 1.0)
    teacher[0] += 1e4
    teacher[1] -= 3e4
    teacher[2, ::3] = -np.inf
    teacher[3, :1000] = -np.inf
    teacher[4] = np.round(teacher[4] * 8) / 8  # many alike, 0 and -0 among them
    student[5] = teacher[5]
    for temperature in (1.0, 3.0, 0.5):
        result = check(adaptive(student, teacher, temperature=temperature), threads=64, cluster=2, seed=3)
        assert result.loss[5] == 0


def test_does_not_depend_on_the_schedule(rng):
    case = adaptive(logits(rng, 1, 1033, BF16), logits(rng, 1, 1033, BF16, 1.0))
    results = [launch_divergence(case, threads=64, cluster=4, seed=seed) for seed in range(3)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


def test_light_entries_are_not_counted(rng):
    """Most of a peaked row cannot be at the boundary, and costs no atomic operation."""
    case = adaptive(logits(rng, 1, 8192, BF16), logits(rng, 1, 8192, BF16, 6.0))
    counters = check(case, threads=256).counters
    assert counters.group("atomic_shared") < 0.2 * 8192


def without_barrier(text: str, pattern: str, before: bool) -> str:
    """Without the last barrier before the first addition to a histogram, or the first one after it."""
    addition = text.index("atom.shared")
    spans = [match.span() for match in re.finditer(pattern, text, re.DOTALL)]
    start, end = [s for s in spans if s[1] < addition][-1] if before else next(s for s in spans if s[0] > addition)
    return text[:start] + text[end:]


@pytest.mark.parametrize(
    "pattern,before",
    [
        pytest.param(BLOCK_BARRIER, True, id="zeros"),
        pytest.param(CLUSTER_BARRIER, False, id="own", marks=pytest.mark.slow),
        pytest.param(BLOCK_BARRIER, False, id="total", marks=pytest.mark.slow),
    ],
)
def test_histogram_without_a_barrier_is_a_race(pattern, before, tmp_path: Path, rng):
    """Between the zeros and the masses, the masses and the sum over the blocks, that sum and its readers."""
    case = adaptive(logits(rng, 1, 515, F32), logits(rng, 1, 515, F32, 1.0))
    text = Path(divergence_module("sm_90", "adaptive_kl", case.student, case.teacher).path).read_text()
    (tmp_path / "racy.ptx").write_text(without_barrier(text, pattern, before))
    module = ptxsim.load_ptx(tmp_path / "racy.ptx")
    with pytest.raises(ptxsim.KernelError, match="race|exited"):
        for seed in range(6):
            launch_divergence(case, threads=64, cluster=2, seed=seed, module=module)
