"""adaptive_kl on CUDA: the range in which the kernel looks for the boundary of the teacher's head."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import ptxsim
import pytest
from ptx_kernels import DivergenceCase, divergence_module
from test_divergence_cluster_cuda import BLOCK_BARRIER, CLUSTER_BARRIER
from test_divergence_cuda import BF16, F16, F32, check, logits, run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def adaptive(student: np.ndarray, teacher: np.ndarray, **options) -> DivergenceCase:
    return DivergenceCase(student, teacher, "adaptive_kl", **options)


def reads(case: DivergenceCase, arch: str = "sm_90", **options) -> float:
    """How often the teacher's logits come from memory; checked against the oracle."""
    counters = check(case, arch, count=True, **options).counters
    return counters.buffers[1].load_bytes / case.teacher.nbytes


@pytest.mark.parametrize("spread", [0.03, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_flat_rows_are_read_once(spread, dtype, rng):
    """Thousands of entries make up the head; the boundary lies among the few that were listed."""
    for mu, vocab in ((0.5, 6007), (0.05, 4096), (0.95, 5003)):
        case = adaptive(logits(rng, 2, vocab, dtype), logits(rng, 2, vocab, dtype, spread), alpha=mu)
        assert reads(case, threads=64, cluster=2, seed=1) < 1.05


@pytest.mark.parametrize("arch,cluster", [("sm_80", 1), ("sm_90", 4), ("sm_100", 8)])
def test_flat_rows_in_blocks_and_clusters(arch, cluster, rng):
    case = adaptive(logits(rng, 2, 5003, BF16), logits(rng, 2, 5003, BF16, 1.0))
    assert reads(case, arch, threads=32, cluster=cluster, seed=2) < 1.15


def test_flat_rows_of_other_offsets(rng):
    """Far from 0, where a position among the bins has few digits left; at other temperatures; masked in part."""
    student, teacher = logits(rng, 6, 4099, F32), logits(rng, 6, 4099, F32, 1.0)
    teacher[0] += 1e4
    teacher[1] -= 3e4
    teacher[2, ::3] = -np.inf
    teacher[3, :4000] = -np.inf
    teacher[4] = np.round(teacher[4] * 8) / 8  # many alike
    student[5] = teacher[5]
    for temperature in (1.0, 3.0, 0.5):
        case = adaptive(student, teacher, temperature=temperature)
        result = check(case, threads=64, cluster=2, seed=3)
        assert result.loss[5] == 0
    assert reads(adaptive(student[:4], teacher[:4]), threads=64, cluster=2) < 1.3


def test_head_of_few_values(rng):
    """Rows of so few values that the list has no room for those at the boundary: looked at again, and right."""
    values = np.array([0.5, 0.25, 0.0, -0.25], np.float32)
    teacher = values[rng.integers(0, 4, (2, 6007))].astype(BF16)
    teacher[1, 17] = 3.0
    case = adaptive(logits(rng, 2, 6007, BF16), teacher)
    assert reads(case, threads=64, cluster=2, seed=1) > 1.5


def test_staged_and_kept_in_part(rng):
    teacher = logits(rng, 1, 4099, BF16, 1.0)
    for staged, kept in ((3, 1), (0, 0)):
        case = adaptive(logits(rng, 1, 4099, BF16), teacher, staged_turns=staged, kept_turns=kept)
        check(case, threads=64, cluster=2, seed=4)


def test_flat_rows_do_not_depend_on_the_schedule(rng):
    case = adaptive(logits(rng, 2, 4099, BF16), logits(rng, 2, 4099, BF16, 1.0))
    results = [run(case, threads=64, cluster=4, seed=seed) for seed in range(3)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


def test_most_of_a_peaked_row_is_not_counted(rng):
    """A peaked row needs no count of all entries: no atomic operation per entry."""
    case = adaptive(logits(rng, 1, 8192, BF16), logits(rng, 1, 8192, BF16, 6.0))
    counters = check(case, threads=256, count=True).counters
    assert counters.group("atomic_shared") < 0.2 * 8192


# Where barriers lie in the PTX: around the counts of a flat row, which `red` adds to.
def removed(text: str, pattern: str, last_before: bool) -> str:
    first, last = text.index("red.shared"), text.rindex("red.shared")
    spans = [match.span() for match in re.finditer(pattern, text, re.DOTALL)]
    start, end = (
        [span for span in spans if span[1] < first][-1] if last_before else next(s for s in spans if s[0] > last)
    )
    return text[:start] + text[end:]


@pytest.mark.parametrize(
    "pattern,last_before", [(BLOCK_BARRIER, True), (CLUSTER_BARRIER, True), (CLUSTER_BARRIER, False)]
)
def test_counts_without_a_barrier_are_a_race(pattern, last_before, tmp_path: Path, rng):
    """Between the first histogram's readers and the zeros that take its place, between these and the counts, and
    between the counts and their readers."""
    case = adaptive(logits(rng, 1, 2051, F32), logits(rng, 1, 2051, F32, 1.0))
    text = Path(divergence_module("sm_90", "adaptive_kl", case.student, case.teacher).path).read_text()
    (tmp_path / "racy.ptx").write_text(removed(text, pattern, last_before))
    module = ptxsim.load_ptx(tmp_path / "racy.ptx")
    with pytest.raises(ptxsim.KernelError, match="race|exited"):
        for seed in range(6):
            run(case, threads=64, cluster=2, seed=seed, module=module)
