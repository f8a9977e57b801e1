"""The CUDA kernels of `topk_logits`, executed from their PTX by ptxsim, against the float64 reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from ptx_topk_logits import TopkCase, launch_topk
from tiers import full

from distillm_ext.reference.compression import compress_logits_reference

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
ARCHITECTURES = ("sm_90", *full("sm_80"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def logits(rng, rows: int, vocab: int, dtype=F32, spread: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((rows, vocab)) * spread).astype(dtype)


def unaligned(array: np.ndarray, entries: int, stride: int) -> np.ndarray:
    """The same values `entries` past an aligned address, rows `stride` apart."""
    storage = np.full(entries + len(array) * stride, 99, array.dtype)
    view = storage[entries:].reshape(len(array), stride)[:, : array.shape[1]]
    view[...] = array
    return view


def check(case: TopkCase, arch: str = "sm_90", atol: float = 3e-6, **options):
    """Ids and counts exactly, numbers to rounding."""
    found = launch_topk(case, arch, **options)
    labels, position = (None if x is None else torch.from_numpy(x) for x in (case.labels, case.position))
    expected = compress_logits_reference(
        torch.from_numpy(case.logits.astype(np.float64)), case.k, temperatures=case.temperatures, labels=labels,
        method="topk" if position is None else "sample", seed=case.seed, position=position,
    )  # fmt: skip
    np.testing.assert_array_equal(found.valid, expected.valid.numpy())
    np.testing.assert_array_equal(found.ids, expected.ids.numpy())
    if case.position is not None:
        np.testing.assert_array_equal(found.counts, expected.counts.numpy())
    for name in ("logprobs", "log_norm", "tail_logprob", "label_logprob"):
        if getattr(expected, name) is not None:
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name).numpy(), rtol=4e-7, atol=atol)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_against_reference(rng, arch, dtype):
    labels = np.array([0, -100, 5000])
    for seed, vocab in enumerate((1, 7, 1023)):
        check(TopkCase(logits(rng, 3, vocab, dtype), 8, (2.0, 1.0, 0.5), labels, threads=64), arch, seed=seed)


@pytest.mark.parametrize("seed", (1, 2))
@pytest.mark.parametrize("k", (1, 64, 200))
def test_several_steps(rng, seed, k):
    """Rows longer than one step of the block, with the first threshold chosen and raised."""
    check(TopkCase(logits(rng, 1, 9001, BF16), k), seed=seed)


@pytest.mark.parametrize("order", ("ascending", "descending", "constant", "few values"))
def test_adversarial_orders(order):
    """More candidates per step than there is room for; ties everywhere."""
    base = np.linspace(-20, 20, 2001, dtype=np.float32)
    values = {
        "ascending": base,
        "descending": base[::-1].copy(),
        "constant": np.full(2001, 1.5, np.float32),
        "few values": (np.arange(2001) % 7).astype(np.float32),
    }[order]
    for k in (1, 33):
        check(TopkCase(values[None], k, threads=64, capacity=256), atol=5e-6)
    check(TopkCase(values[None].astype(BF16), 50, threads=32, capacity=128), atol=5e-6)


def test_large_k(rng):
    check(TopkCase(logits(rng, 1, 1500), 1024, threads=128, capacity=2048))
    found = check(TopkCase(logits(rng, 1, 1100), 1100, (1.0, 2.0), threads=128, capacity=2048))
    assert (found.tail_logprob == -np.inf).all()


def test_layouts(rng):
    values = logits(rng, 3, 517, BF16)
    for entries in (0, 1, 3, 7):
        for stride in (517, 530):
            case = TopkCase(unaligned(values, entries, stride), 9, threads=64)
            check(case)
            case.position = np.arange(3)
            check(TopkCase(case.logits, 9, position=np.arange(3), threads=64))


@pytest.mark.parametrize("sample", (False, True))
def test_masked_and_bad_rows(rng, sample):
    values = logits(rng, 7, 600)
    values[1, 77], values[2, 599], values[3] = np.nan, np.inf, -np.inf
    values[4, ::2], values[5, 3:], values[6, 1:] = -np.inf, -np.inf, -np.inf
    position = np.arange(7) if sample else None
    found = check(TopkCase(values, 8, (1.0, 2.0), np.arange(7), position, threads=64))
    assert found.valid.tolist() == [1, 0, 0, 0, 1, 1, 1]


def test_tiny_tail_masses_are_exact():
    values = np.full((2, 300), -30, np.float32)
    values[0, 5], values[1, 5] = 60, 1e4
    check(TopkCase(values, 1, threads=64), atol=3e-5)
    check(TopkCase(np.array([[120, 0, -120, 119]], np.float32), 2, threads=32), atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_sample(rng, arch, dtype):
    """Equal to the reference's draws: no draw here falls within rounding of a boundary."""
    for seed, vocab in enumerate((1, 7, 1023)):
        values, position = logits(rng, 3, vocab, dtype), np.array([3, 2**40, -5])
        check(TopkCase(values, 24, (1.0, 2.0), np.zeros(3, np.int64), position, seed - 1, threads=64), arch, seed=seed)


def test_sample_long_segments(rng):
    """More entries than 1024 segments of one chunk per lane hold."""
    check(TopkCase(logits(rng, 1, 131073 + 500), 12, position=np.array([11])), atol=5e-6)


def test_sample_with_workspace(rng):
    check(TopkCase(logits(rng, 1, 1300), 1100, position=np.array([2])))


def test_sample_does_not_depend_on_alignment_or_threads(rng):
    values, position = logits(rng, 3, 1001, BF16), np.array([4, 5, 6])
    first = launch_topk(TopkCase(values, 16, position=position, threads=64))
    moved = TopkCase(unaligned(values, 3, 1010), 16, position=position, threads=256)
    for found in (launch_topk(moved, seed=3),):
        for name in ("ids", "counts", "logprobs", "tail_logprob"):
            np.testing.assert_allclose(getattr(found, name), getattr(first, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sample", (False, True))
def test_repeated_runs_agree_bit_for_bit(rng, sample):
    values, position = logits(rng, 2, 1500, BF16), np.arange(2) if sample else None
    results = [launch_topk(TopkCase(values, 20, position=position, threads=64, capacity=128), seed=s)
               for s in (0, 1, 2)]  # fmt: skip
    for name in ("ids", "logprobs", "log_norm", "tail_logprob"):
        assert all((getattr(r, name) == getattr(results[0], name)).all() for r in results)


@pytest.mark.parametrize("arch", ("sm_80", *full("sm_100", "sm_120")))
def test_other_architectures(rng, arch):
    check(TopkCase(logits(rng, 2, 700, BF16), 16), arch)
    check(TopkCase(logits(rng, 2, 700, BF16), 16, position=np.arange(2)), arch)


def test_each_logit_is_read_once(rng):
    counters = launch_topk(TopkCase(logits(rng, 2, 16384, BF16)), check_races=False).counters
    assert counters.buffers[0].load_bytes == 2 * 2 * 16384
    sampled = launch_topk(TopkCase(logits(rng, 2, 16384, BF16), 16, position=np.arange(2)), check_races=False).counters
    assert 2 * 2 * 16384 < sampled.buffers[0].load_bytes <= 2 * 2 * 2 * 16384
