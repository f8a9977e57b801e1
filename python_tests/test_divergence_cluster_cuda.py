"""The CUDA kernel of `divergence` in thread-block clusters, and the plan of its launch."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import ptxsim
import pytest
from ptx_kernels import DivergenceCase, architecture, divergence_module, launch_divergence, launch_planned, plan_launch
from test_divergence_cuda import BF16, F32, check, logits, unaligned
from tiers import full


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(23)


@pytest.mark.parametrize("arch", ["sm_90", *full("sm_100")])
@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_cluster_sizes(arch, cluster, rng):
    """Odd vocabularies, some too short for every block to have an entry; staged and kept whole, in part, not at all."""
    for seed, vocab in enumerate((1, 31, 1023, 2051)):
        case = DivergenceCase(logits(rng, 2, vocab, BF16), logits(rng, 2, vocab, BF16))
        for case.staged_turns, case.kept_turns in ((None, None), (2, 1), (0, 0)):
            check(case, arch, cluster=cluster, threads=32, seed=seed)


def test_mixed_dtypes_and_unaligned_rows(rng):
    for student, teacher in ((F32, BF16), (BF16, F32), (BF16, BF16)):
        case = DivergenceCase(
            unaligned(logits(rng, 2, 517, student), 3), unaligned(logits(rng, 2, 517, teacher), 2, 519),
            labels=np.array([516, 2]), ce_weight=0.5, temperature=2.0,
        )  # fmt: skip
        check(case, cluster=4, threads=32, seed=3)


def test_unequal_vocabularies(rng):
    for vocabs in ((1000, 1030), (1030, 9)):
        case = DivergenceCase(logits(rng, 2, vocabs[0], F32), logits(rng, 2, vocabs[1], F32))
        check(case, cluster=2, threads=64, seed=1)


@pytest.mark.parametrize("kept", [0, 2, None])
def test_in_place(kept, rng):
    case = DivergenceCase(
        unaligned(logits(rng, 2, 1517, BF16), 3), logits(rng, 2, 1517, BF16), in_place=True, kept_turns=kept,
        labels=np.array([5, 1516]), ce_weight=0.5,
    )  # fmt: skip
    for seed in (0, 4):
        case.student[...] = logits(rng, 2, 1517, BF16)
        check(case, cluster=2, threads=32, seed=seed)


def test_unusable_rows_stay_alone(rng):
    student, teacher = logits(rng, 5, 1033, BF16), logits(rng, 5, 1033, BF16)
    student[0], teacher[1], student[2, 1000], teacher[3, ::3] = -np.inf, -np.inf, np.nan, -np.inf
    case = DivergenceCase(student, teacher, weight=np.array([1, 1, 1, 2, 0], np.float32))
    result = check(case, cluster=4, threads=32, seed=2)
    assert np.isnan(result.loss[:3]).all() and np.isfinite(result.loss[3:]).all()


def test_independent_of_the_schedule(rng):
    case = DivergenceCase(logits(rng, 2, 2051, F32), logits(rng, 2, 2051, F32), "generalized_js")
    results = [launch_divergence(case, threads=64, cluster=4, seed=seed) for seed in range(3)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


def without(text: str, pattern: str, which: int) -> str:
    found = [match.span() for match in re.finditer(pattern, text, re.DOTALL)]
    start, end = found[which]
    return text[:start] + text[end:]


BLOCK_BARRIER = r"(bar|barrier)\.sync[^;]*;"
CLUSTER_BARRIER = r"barrier\.cluster\.arrive(?!\.relaxed)[^;]*;.*?barrier\.cluster\.wait[^;]*;"


@pytest.mark.parametrize("pattern", [BLOCK_BARRIER, CLUSTER_BARRIER], ids=["block", "cluster"])
@pytest.mark.parametrize("which", [0, *full(1, 2, 3)])
def test_race_check_sees_a_missing_barrier(pattern, which, tmp_path: Path, rng):
    """The kernel without one of its barriers is caught: the silence of the other tests means something. The row is one
    whose logits leave the range of float with the scale, so that it comes to all of them."""
    case = DivergenceCase(logits(rng, 1, 515, F32), logits(rng, 1, 515, F32), "forward_kl", temperature=0.25)
    case.student[0, 7] = np.finfo(np.float32).max
    text = Path(divergence_module("sm_90", "forward_kl", case.student, case.teacher).path).read_text()
    (tmp_path / "racy.ptx").write_text(without(text, pattern, which))
    module = ptxsim.load_ptx(tmp_path / "racy.ptx")
    with pytest.raises(ptxsim.KernelError, match="race|exited"):
        for seed in range(4):
            launch_divergence(case, threads=128, cluster=2, seed=seed, module=module)


def planned(vocab: int, arch: str, dtype=ml_dtypes.bfloat16, **options):
    row = np.zeros((1, vocab), dtype)
    return plan_launch(DivergenceCase(row, row), arch, **options)


# The largest vocabulary of test_plan that is staged whole.
STAGED_WHOLE = {"sm_80": 39000, "sm_86": 23000, "sm_89": 23000, "sm_90": 262144, "sm_100": 262144, "sm_120": 151936}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", *full("sm_86", "sm_89", "sm_100", "sm_120")])
def test_plan(arch):
    """Rows are staged whole by the blocks that share them, as far as eight can; before 9.0 by one block, as far as that
    can."""
    for vocab in (1, 7, 4096, 23000, 32000, 39000, 50257, 128256, 151936, 262144):
        case = DivergenceCase(np.zeros((1, vocab), BF16), np.zeros((1, vocab), BF16))
        plan = plan_launch(case, arch)
        turns, _ = case.turns(plan.cluster, plan.threads)
        assert plan.threads % 32 == 0 and 32 <= plan.threads <= 384
        assert 0 <= plan.kept_turns <= plan.staged_turns <= turns
        assert (plan.staged_turns == turns) == (vocab <= STAGED_WHOLE[arch])
        alone = plan_launch(case, arch, clusters=False)
        assert alone.cluster == 1 and (architecture(arch) >= 90 or plan == alone)


def test_plan_of_clusters():
    assert planned(4096, "sm_90").cluster == 1 and planned(151936, "sm_90").cluster == 8
    assert planned(50257, "sm_90").kept_turns == planned(50257, "sm_90").staged_turns


NOT_SM_90 = [
    pytest.param(*case, marks=pytest.mark.slow) for case in (("sm_80", 1.42), ("sm_89", 2.03), ("sm_120", 1.01))
]


@pytest.mark.parametrize("arch,reads", [("sm_90", 1.01), *NOT_SM_90])
def test_as_planned(arch, reads, rng):
    """Before 9.0 what a block has no room for is read in all three passes."""
    case = DivergenceCase(logits(rng, 1, 50257, BF16), logits(rng, 1, 50257, BF16), "skew_kl")
    result = launch_planned(case, arch)
    counted = sum(buffer.load_bytes for buffer in result.counters.buffers[:2]) / case.student.nbytes / 2
    assert reads - 0.02 < counted <= reads
    assert result.counters.buffers[2].store_bytes == case.student.nbytes
