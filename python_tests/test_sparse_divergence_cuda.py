"""The CUDA kernel of `sparse_divergence`, executed from its PTX by ptxsim, against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import ptxsim
import pytest
import torch
from ptx_sparse import SparseCase, changed, launch_sparse, sparse_module, sparse_reference
from sparse_cases import FORMS, compressed, edited
from tiers import full

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
ROUNDING = {F32: 2.0**-22, BF16: 2.0**-8, F16: 2.0**-11}
SUBNORMAL = {F32: 1e-38, BF16: 1e-38, F16: 2.0**-24}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


def case_of(rng, rows: int, vocab: int, k: int, dtype=F32, tail: str = "bucket", teacher_vocab=None, **fields):
    student = (rng.standard_normal((rows, vocab)) * 3).astype(dtype)
    teacher = torch.tensor(rng.standard_normal((rows, teacher_vocab or vocab)) * 3, dtype=torch.float32)
    return SparseCase(student, compressed(teacher, k, tail), tail=tail, **fields)


def check(case: SparseCase, arch: str = "sm_90", **options):
    """Launches and compares every row: NaN and infinities in the same places, values and gradients close."""
    loss, gradient = sparse_reference(case)  # first: an in-place launch overwrites the student
    dtype, vocab = case.student.dtype, case.student.shape[1]
    result = launch_sparse(case, arch, **options)
    np.testing.assert_allclose(result.loss, loss, rtol=3e-5, atol=5e-6)
    if result.gradient is not None:
        got = result.gradient[:, :vocab].astype(np.float64)
        assert (np.isnan(got) == np.isnan(gradient)).all()
        scale = np.nan_to_num(np.abs(gradient)).max(-1, keepdims=True)
        allowed = ROUNDING[dtype] * np.abs(gradient) + 1e-5 * scale + 2e-6 + SUBNORMAL[dtype]
        wrong = np.abs(got - gradient) > allowed
        assert not wrong.any(), (np.argwhere(wrong)[:5], got[wrong][:5], gradient[wrong][:5])
        assert (result.gradient[:, vocab:].astype(np.float32) == 0).all()
    return result


@pytest.mark.parametrize("arch", ["sm_90", *full("sm_80")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda dtype: dtype.name)
def test_dtypes_sizes_and_schedules(arch, dtype, rng):
    for seed, (vocab, k) in enumerate(((1, 1), (7, 3), (31, 40), (1023, 64), (4099, 100))):
        for threads in (32, 160):
            check(case_of(rng, 2, vocab, k, dtype), arch, threads=threads, seed=seed)


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_divergences_and_tails(divergence, tail, rng):
    for temperature in (1.0,) if tail == "sampled" else (1.0, 2.5):
        for detach in (False, True) if divergence == "skew_reverse_kl" else (False,):
            fields = dict(divergence=divergence, temperature=temperature, detach_mixture=detach)
            check(case_of(rng, 2, 517, 24, tail=tail, **fields))


@pytest.mark.parametrize("tail", ["bucket", "truncate", "sampled"])
def test_alpha_per_row(tail, rng):
    for divergence in ("skew_kl", "skew_reverse_kl"):
        case = case_of(rng, 5, 203, 16, tail=tail, divergence=divergence)
        case.alpha_rows = np.array([1, 0.3, 1.5, np.nan, 0], np.float32)
        if divergence == "skew_reverse_kl" and tail != "bucket":
            case.alpha_rows[4] = 0.5  # at 0: reverse KL, whose truncated tail and sampled form are other ones
        assert np.isnan(check(case).loss).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("arch", ["sm_80", *full("sm_100", "sm_120")])
def test_other_architectures(arch, rng):
    case = case_of(rng, 2, 1023, 32, BF16)
    for seed in (0, 5):
        check(case, arch, threads=64, seed=seed)


@pytest.mark.parametrize("staged", [0, 20, None])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda dtype: dtype.name)
def test_layouts(staged, dtype, rng):
    """Rows that start anywhere, other strides, a wider gradient, no gradient, in place."""
    case = case_of(rng, 2, 1003, 32, dtype, staged_chunks=staged, labels=np.array([5, 1002]), ce_weight=0.5)
    values = case.student
    for seed, (offset, stride, wide) in enumerate(((0, 1003, 1003), (1, 1003, 1003), (3, 1010, 1024), (0, 1008, 1005))):
        storage = np.zeros(offset + 2 * stride, dtype)
        view = storage[offset:].reshape(2, stride)[:, :1003]
        view[...] = values
        check(changed(case, student=view, gradient_vocab=wide), seed=seed)
        check(changed(case, student=view, need_gradient=False), seed=seed)
        check(changed(case, student=view, in_place=True, temperature=2.5), seed=seed)


def test_padding_duplicates_and_ids_out_of_range(rng):
    case = case_of(rng, 2, 300, 40)
    clean = check(case)
    teacher = case.teacher
    # A duplicate far behind its first, many of one id, ids that no vocabulary has.
    junk = torch.tensor([-1, 300, 2**31 - 1, -(2**31)] + [0] * 40).int().expand(2, 44).clone()
    junk[:, 4:24], junk[:, 24:] = teacher.ids[:, :20], teacher.ids[:, 5:6]
    noise = torch.full((2, 44), -0.5)
    noise[:, :4] = torch.nan
    dirty = edited(
        teacher, ids=torch.cat([teacher.ids, junk], -1), logprobs=torch.cat([teacher.logprobs, noise], -1)
    )  # fmt: skip
    for seed in range(4):
        result = check(changed(case, teacher=dirty), seed=seed, threads=96)
        np.testing.assert_allclose(result.loss, clean.loss, rtol=1e-6)
        np.testing.assert_allclose(result.gradient, clean.gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl", "forward_kl", "total_variation"])
def test_unequal_vocabularies(divergence, rng):
    for vocab, teacher_vocab in ((200, 260), (260, 200)):
        check(case_of(rng, 3, vocab, 32, teacher_vocab=teacher_vocab, divergence=divergence))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_masked_columns_and_far_tails(tail, rng):
    for divergence in ("forward_kl", "reverse_kl", "skew_kl"):
        case = case_of(rng, 4, 203, 16, tail=tail, divergence=divergence)
        case.student[0, ::3] = case.student[1, 1:] = -np.inf
        off = np.ones(203, bool)
        off[case.teacher.ids[2].numpy()] = False
        case.student[2, off] = -np.inf  # no mass off the kept entries
        case.student[3, ~off] += 150  # or mass that underflows
        case.teacher.ids[3] = case.teacher.ids[2]
        case.teacher.logprobs[3] = case.teacher.logprobs[2]
        result = check(case)
        legal = ~np.isnan(result.loss)  # NaN: renormalize where the student has nothing on the kept entries
        assert legal[[0, 2, 3]].all() and (result.gradient[legal][np.isinf(case.student[legal])] == 0).all()


def test_bad_rows_stay_alone_and_skipped_rows_are_not_read(rng):
    for tail in ("bucket", "sampled"):
        case = case_of(rng, 8, 133, 12, tail=tail)
        case.student[0], case.student[1, 100], case.student[2, 3] = -np.inf, np.nan, np.inf
        case.teacher.logprobs[3, 2], case.teacher.log_norm[4, 0] = torch.nan, torch.nan
        case.teacher.logprobs[5, 0] = torch.inf
        result = launch_sparse(case, seed=3)
        assert np.isnan(result.loss).tolist() == [True] * 6 + [False] * 2
        assert np.isnan(result.gradient).all(-1).tolist() == [True] * 6 + [False] * 2
        case.labels, case.weight = np.full(8, -100), np.ones(8, np.float32)
        result = check(case)
        assert result.counters.buffers[0].load_bytes == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_cross_entropy_weights_and_caps(temperature, rng):
    case = case_of(rng, 7, 301, 16, BF16, temperature=temperature, ce_weight=0.7)
    on, off = int(case.teacher.ids[1, 2]), int(case.teacher.ids[0, 0])
    case.labels = np.array([off, on, 300, 17, -100, 301, -1])
    case.weight = np.array([1, 2, 3, 1, 1, 1, 1], np.float32)
    case.cap = np.array([9, 9, 9, 0.01, 9, 9, 9], np.float32)
    for staged in (0, None):
        result = check(changed(case, staged_chunks=staged), seed=2)
    assert np.isnan(result.loss[5:]).all() and result.loss[4] == 0
    check(changed(case, tail="renormalize"))


def test_independent_of_the_schedule(rng):
    case = case_of(rng, 2, 2051, 64)
    results = [launch_sparse(case, threads=160, seed=seed) for seed in range(4)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].loss, other.loss)
        np.testing.assert_array_equal(results[0].gradient, other.gradient)


def test_counted_traffic(rng):
    """Each logit is read once where the row is staged, twice where it is not; each gradient is written once."""
    rows, vocab, k = 2, 4096, 32
    entries, kept = rows * vocab, rows * k
    case = case_of(rng, rows, vocab, k, BF16)
    for staged, reads in ((None, 1), (256, 1.5), (0, 2)):
        counters = check(changed(case, staged_chunks=staged), threads=128).counters
        student = counters.buffers[0]
        assert student.load_bytes == 2 * entries * reads + 2 * kept
        assert counters.store_bytes == 2 * entries + 2 * kept + 4 * rows
    accesses = {site.text.split()[0] for site in counters.sites if site.access == "load global"}
    assert "ld.global.v4.u32" in accesses


@pytest.mark.parametrize("barrier", [1, *full(3)])
def test_race_check_sees_a_missing_barrier(barrier, tmp_path: Path, rng):
    """The kernel without one of its barriers is caught: the silence of the other tests means something."""
    case = case_of(rng, 1, 515, 64)
    lines = Path(sparse_module("sm_90", case.student).path).read_text().splitlines()
    barriers = [n for n, line in enumerate(lines) if "bar.sync" in line or "barrier.sync" in line]
    lines[barriers[barrier]] = "//"
    (tmp_path / "racy.ptx").write_text("\n".join(lines))
    with pytest.raises(ptxsim.KernelError, match="race"):
        for seed in range(8):
            launch_sparse(case, threads=128, seed=seed, module=ptxsim.load_ptx(tmp_path / "racy.ptx"))
