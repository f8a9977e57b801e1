"""The CUDA kernel of `divergence` in teams: blocks of a cooperative launch that share rows, before sm_90."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import ptxsim
import pytest
from ptx_kernels import DivergenceCase, divergence_module
from test_divergence_cuda import BF16, F16, F32, check, logits, run, unaligned
from test_divergence_metrics_cuda import expected_metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(37)


GOOD, ZERO, ILLEGAL = [0, 1, 4, 7, 10], [3, 8, 9], [2, 5, 6]


def mixed_rows(rng, vocab: int, dtype, divergence: str = "skew_kl", **options) -> DivergenceCase:
    """Good rows between rows without any barrier (left out, illegal) and rows that end early or take more of them. One
    that ends early, one without a barrier, a good one: the first writes of that meet the last reads of the first."""
    student, teacher = logits(rng, 11, vocab, dtype), logits(rng, 11, vocab, dtype)
    student[2, vocab // 2] = np.nan
    if dtype is F32:
        student[4] = np.finfo(F32).min  # the product with the scale is not a float
    teacher[5] = -np.inf
    labels = np.arange(11) * (vocab // 11)
    labels[6], labels[9] = vocab, -100
    weight = np.array([1, 2, 1, 0, 1, 1, 1, 0.5, 0, 1, -1], np.float32)
    return DivergenceCase(student, teacher, divergence, labels=labels, weight=weight, ce_weight=0.5, **options)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_team_sizes(arch, size, rng):
    """Odd vocabularies, some too short for every block to have an entry; staged and kept whole, in part, not at all."""
    for seed, vocab in enumerate((1, 31, 1023, 2051)):
        case = DivergenceCase(logits(rng, 3, vocab, BF16), logits(rng, 3, vocab, BF16))
        for case.staged_turns, case.kept_turns in ((None, None), (2, 1), (0, 0)):
            check(case, arch, cluster=size, threads=32, seed=seed, teams=1 + seed % 3)


@pytest.mark.parametrize("teams", [1, 2, 3, 11])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_in_turn(teams, dtype, rng):
    """More rows than teams, with and without barriers, in both mailboxes."""
    for seed, temperature in enumerate((1.0, 2.0, 0.5)):
        case = mixed_rows(rng, 517, dtype, temperature=temperature, need_metrics=True)
        result = check(case, "sm_80", cluster=4, threads=64, seed=seed, teams=teams)
        with np.errstate(invalid="ignore"):
            expected = expected_metrics(case)
        np.testing.assert_allclose(result.metrics[GOOD], expected[GOOD], rtol=2e-5, atol=2e-6)
        assert (result.metrics[ZERO] == 0).all() and np.isnan(result.metrics[ILLEGAL]).all()


@pytest.mark.parametrize("divergence", ["alpha_beta", "token_adaptive", "adaptive_kl", "interpolated"])
def test_members(divergence, rng):
    for seed in range(2):
        check(mixed_rows(rng, 333, F32, divergence), "sm_80", cluster=2, threads=32, seed=seed, teams=2)


def test_mixed_dtypes_and_unaligned_rows(rng):
    for student, teacher in ((F32, BF16), (BF16, F32), (BF16, BF16), (F16, BF16)):
        case = DivergenceCase(
            unaligned(logits(rng, 3, 517, student), 3), unaligned(logits(rng, 3, 517, teacher), 2, 519),
            labels=np.array([516, 2, 0]), ce_weight=0.5, temperature=2.0,
        )  # fmt: skip
        check(case, "sm_80", cluster=4, threads=32, seed=3)


def test_unequal_vocabularies(rng):
    for vocabs in ((1000, 1030), (1030, 9)):
        case = DivergenceCase(logits(rng, 5, vocabs[0], F32), logits(rng, 5, vocabs[1], F32))
        check(case, "sm_80", cluster=2, threads=64, seed=1)


@pytest.mark.parametrize("divergence", ["skew_kl", "adaptive_kl", "interpolated"])
@pytest.mark.parametrize("kept", [0, 2, None])
def test_in_place(divergence, kept, rng):
    student = logits(rng, 5, 1517, BF16)
    case = DivergenceCase(
        unaligned(student, 3), logits(rng, 5, 1517, BF16), divergence, in_place=True, kept_turns=kept,
        labels=np.array([5, 1516, 0, 700, 9]), ce_weight=0.5,
    )  # fmt: skip
    for seed in (0, 4):
        case.student[...] = student
        check(case, "sm_80", cluster=2, threads=32, seed=seed)


@pytest.mark.parametrize("mu", [0.04, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_heads_of_the_teacher(mu, dtype, rng):
    """adaptive_kl: the lists of all blocks, lists that overflow, and rows that are searched whole."""
    teacher = logits(rng, 8, 2403, dtype)
    teacher[1] = 0
    teacher[2] = np.repeat([3, 1, -2, -5, -5.5, -70, 2, 0, 9], 267)
    teacher[3, 77] = 40
    teacher[4] = rng.integers(-2, 3, 2403)
    teacher[5, 3:] = -np.inf
    teacher[6] = rng.standard_normal(2403) * 1e-3
    for seed, size in enumerate((2, 4)):
        case = DivergenceCase(logits(rng, 8, 2403, dtype), teacher, "adaptive_kl", alpha=mu)
        check(case, "sm_80", cluster=size, threads=32, seed=seed, teams=3)


def test_interpolated_of_sides_without_overlap(rng):
    """The sum of exponentials of the blend underflows, and the pass is made once more."""
    student, teacher = logits(rng, 5, 333, F32), logits(rng, 5, 333, F32)
    student[::2, ::2] += 120
    teacher[::2, 1::2] += 120
    for seed, staged in enumerate((None, 1)):
        case = DivergenceCase(student, teacher, "interpolated", staged_turns=staged, need_metrics=True)
        result = check(case, "sm_80", cluster=4, threads=32, seed=seed)
        np.testing.assert_allclose(result.metrics, expected_metrics(case), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("divergence", ["generalized_js", "adaptive_kl"])
def test_independent_of_schedule_and_teams(divergence, rng):
    case = DivergenceCase(logits(rng, 5, 2051, F32), logits(rng, 5, 2051, F32), divergence)
    results = [run(case, "sm_80", threads=64, cluster=4, seed=seed, teams=1 + seed) for seed in range(4)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


@pytest.mark.parametrize("divergence,exchanged_bytes", [("skew_kl", 16), ("adaptive_kl", 208)])
def test_counted_traffic(divergence, exchanged_bytes, rng):
    """One read of each logit and one write of each gradient, as in the shared memory of one block. adaptive_kl would
    visit the row again if a block had not found the list of another."""
    rows, vocab, threads, size = 3, 4096, 64, 4
    case = DivergenceCase(logits(rng, rows, vocab, BF16), logits(rng, rows, vocab, BF16), divergence)
    counters = check(case, "sm_80", threads=threads, cluster=size, count=True, teams=2).counters
    student, teacher, gradient = counters.buffers[:3]
    first_logits = 2 * rows * size * threads // 32  # loaded by one lane of every warp
    assert student.load_bytes == teacher.load_bytes == case.student.nbytes + first_logits
    assert (gradient.load_bytes, gradient.store_bytes) == (0, case.student.nbytes)
    exchanged = sum(buffer.load_bytes + buffer.store_bytes for buffer in counters.buffers[3:])
    assert 0 < exchanged <= exchanged_bytes * rows * size * threads  # whatever the vocabulary


def edited(case: DivergenceCase, tmp_path: Path, edit) -> ptxsim.Simulator:
    text = Path(divergence_module("sm_80", case.divergence, case.student, case.teacher).path).read_text()
    assert edit(text) != text
    (tmp_path / "edited.ptx").write_text(edit(text))
    return ptxsim.load_ptx(tmp_path / "edited.ptx")


ARRIVAL = r"atom\.add\.acq_rel\.gpu"
FAULTS = {
    "arrival releases nothing": lambda text: re.sub(ARRIVAL, "atom.add.acquire.gpu", text),
    "arrival and wait order nothing": lambda text: re.sub(ARRIVAL, "atom.add.relaxed.gpu", text).replace(
        "ld.acquire.gpu", "ld.relaxed.gpu"
    ),
    "other threads do not wait": lambda text: re.sub(r"(ld\.acquire.*?)bar\.sync[^;]*;", r"\1", text, flags=re.DOTALL),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_race_check_sees_a_faulty_barrier(fault, tmp_path, rng):
    """The kernel with a barrier that does less is caught: the silence of the other tests means something."""
    case = DivergenceCase(logits(rng, 4, 515, F32), logits(rng, 4, 515, F32))
    module = edited(case, tmp_path, FAULTS[fault])
    with pytest.raises(ptxsim.KernelError, match="race"):
        for seed in range(4):
            run(case, "sm_80", threads=64, cluster=2, seed=seed, module=module)


def test_a_missing_arrival_is_a_deadlock(tmp_path, rng):
    case = DivergenceCase(logits(rng, 1, 515, F32), logits(rng, 1, 515, F32))
    module = edited(case, tmp_path, lambda text: re.sub(rf"({ARRIVAL}[^;]*), 1;", r"\1, 0;", text))
    with pytest.raises(ptxsim.KernelError, match="deadlock"):
        run(case, "sm_80", threads=64, cluster=2, module=module, timeout=60)
