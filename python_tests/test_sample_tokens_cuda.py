"""The CUDA kernel of `sample_tokens`, executed from its PTX by ptxsim: the CPU kernel's tokens, without exception."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import ptxsim
import pytest
import torch
from ptx_kernels import ptxas_report
from ptx_sampling import SamplingCase, launch_sampling, launch_shape, sampling_module
from ptxsim.module import MAX_SHARED

from distillm_ext.ops.sample_tokens import sample_tokens as cpu_operator

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
RULES = [
    {}, {"temperature": 0.8}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.1}, {"top_k": 20, "min_p": 0.05}, {"top_p": 0.95, "min_p": 0.02},
    {"top_k": 10**6, "temperature": 2.0}, {"top_k": 700}, {"top_k": 600, "min_p": 0.01}, {"top_p": 0.999},
]  # fmt: skip
ENDS = np.array([0, -1, 2**63 - 1, -(2**63)])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(29)


def logits(rng, rows: int, vocab: int, dtype=F32, spread: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((rows, vocab)) * spread).astype(dtype)


def unaligned(array: np.ndarray, entries: int, stride: int | None = None) -> np.ndarray:
    """The same values `entries` past an aligned address, rows `stride` apart."""
    rows, columns = array.shape
    stride = stride or columns
    storage = np.full(entries + rows * stride, np.nan, array.dtype)
    view = storage[entries:].reshape(rows, stride)[:, :columns]
    view[...] = array
    return view


def tensor(array: np.ndarray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == BF16 else torch.tensor(array)


def on_cpu(case: SamplingCase):
    def value(x, dtype):
        return torch.tensor(x, dtype=dtype) if isinstance(x, np.ndarray) else x

    real, integer = torch.float32, torch.int64
    lists = {
        "previous_tokens": None if case.previous_tokens is None else tensor(case.previous_tokens),
        "banned": None if case.banned is None else tensor(case.banned),
        "bits": None if case.bits is None else tensor(case.bits),
    }
    return cpu_operator(
        tensor(case.logits), temperature=value(case.temperature, real), top_k=value(case.top_k, integer),
        top_p=value(case.top_p, real), min_p=value(case.min_p, real), seed=value(case.seed, integer),
        position=value(case.position, integer), repetition_penalty=value(case.repetition_penalty, real), **lists,
    )  # fmt: skip


def check(case: SamplingCase, arch: str = "sm_90", **options):
    """Launches and compares with the CPU kernel: tokens and validity exactly, log-probabilities to rounding."""
    options.setdefault("count", False)
    tokens, logprobs, filtered, valid = (x.numpy() for x in on_cpu(case))
    result = launch_sampling(case, arch, **options)
    np.testing.assert_array_equal(result.valid, valid)
    np.testing.assert_array_equal(result.tokens, tokens)
    np.testing.assert_allclose(result.logprobs, logprobs, rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(result.filtered_logprobs, filtered, rtol=2e-6, atol=1e-6)
    return result


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtypes_sizes_and_rules(arch, dtype, rng):
    for n, rule in enumerate(RULES):
        for vocab in (1, 2, 7, 31, 1023, 2051):
            case = SamplingCase(logits(rng, 3, vocab, dtype), seed=rng.integers(0, 99, 3), position=n, **rule)
            check(case, arch, threads=(32, 96, 256)[n % 3], seed=n)


@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_newer_architectures(arch, rng):
    for rule in RULES[:6]:
        check(SamplingCase(logits(rng, 2, 1023, BF16), seed=rng.integers(0, 99, 2), **rule), arch)


@pytest.mark.parametrize("rows", [1000, pytest.param(35000, marks=pytest.mark.slow)])
def test_no_draw_differs(rows, rng):
    """In the long form more than 10⁵ draws: with integer masses no two cumulative sums meet within rounding."""
    case = SamplingCase(
        logits(rng, rows, 33), seed=rng.integers(-(2**62), 2**62, rows), position=rng.integers(0, 9, rows)
    )
    for rule in ({}, {"top_k": 9, "top_p": 0.8}, {"top_p": 0.7}):
        for name, value in rule.items():
            setattr(case, name, value)
        check(case, threads=32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("staged", [0, 20, None])
def test_layouts(dtype, staged, rng):
    for at, stride in ((0, None), (1, None), (3, 1005), (5, 1024)):
        for rule in (RULES[0], RULES[4], RULES[5]):
            case = SamplingCase(
                unaligned(logits(rng, 3, 1003, dtype), at, stride), seed=at, staged_chunks=staged, **rule
            )
            check(case, seed=at)


def test_per_row_parameters(rng):
    rows = 24
    case = SamplingCase(
        logits(rng, rows, 700),
        temperature=rng.choice([0, 0.5, 1, 2, -1, np.nan], rows).astype(np.float32),
        top_k=rng.choice([0, 1, 40, 900, -3], rows),
        top_p=rng.choice([1, 0.9, 0.3, 0, 1.5], rows).astype(np.float32),
        min_p=rng.choice([0, 0.05, 1], rows).astype(np.float32),
        seed=rng.integers(-9, 9, rows), position=rng.integers(0, 2**40, rows),
    )  # fmt: skip
    result = check(case)
    assert 0 < result.valid.sum() < rows


def test_penalty_and_mask(rng):
    rows, vocab = 4, 1500
    previous = rng.integers(-5, vocab + 5, (rows, 40))
    banned = rng.random((rows, vocab)) < 0.5
    for lists in ({"previous_tokens": previous}, {"banned": banned}, {"banned": banned[0]},
                  {"previous_tokens": previous, "banned": banned}):  # fmt: skip
        for rule in (RULES[0], RULES[2], RULES[4], RULES[5]):
            for dtype, at in ((F32, 0), (BF16, 3)):
                view = unaligned(logits(rng, rows, vocab, dtype), at)
                check(SamplingCase(view, repetition_penalty=1.4, seed=7, **lists, **rule), threads=96)
    everything = np.ones(vocab, bool)
    assert not check(SamplingCase(logits(rng, 2, vocab), banned=everything)).valid.any()


def test_unusable_rows_stay_alone(rng):
    x = logits(rng, 6, 300)
    x[0] = -np.inf
    x[1, 299] = np.nan
    x[2, 0] = np.inf
    x[3] = np.nan
    x[4, 7:] = -np.inf
    for rule in RULES:
        assert check(SamplingCase(x, seed=3, **rule)).valid.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("staged", [0, None])
def test_longer_lists_than_fit(staged, rng):
    """Filters that keep more than the list holds, with and without ties, take the search over the whole row."""
    spread, ties = logits(rng, 1, 3001, spread=0.3), np.round(logits(rng, 1, 3001, spread=0.4))
    equal = np.full((1, 3001), 2.0, np.float32)
    equal[0, 5] = -np.inf
    x = np.concatenate([spread, ties, equal, -equal])
    x[3, 5] = -np.inf
    for rule in ({"top_k": 2000}, {"top_p": 0.8}, {"min_p": 0.01}, {"top_k": 2500, "top_p": 0.6, "min_p": 0.3},
                 {"top_k": 3000, "top_p": 0.9999}):  # fmt: skip
        for bits in (*ENDS, 123456789 << 34):
            check(SamplingCase(x, bits=np.full(4, bits), staged_chunks=staged, **rule), threads=128)


def test_ends_of_the_draw(rng):
    x = logits(rng, 4, 515)
    x[:, 0] = x[:, 514] = -np.inf
    for rule in RULES:
        result = check(SamplingCase(x, bits=ENDS, **rule))
        assert np.isfinite(x[np.arange(4), result.tokens]).all()


def test_extreme_logits():
    x = np.array([[1e4, 9999, -1e4, 1e4], [3e38, -3e38, 3e38, 0], [-0.0, 0.0, -0.0, -1e-45]], np.float32)
    for rule in ({}, {"temperature": 1e-38}, {"temperature": 3e38}, {"top_k": 1}, {"top_k": 2, "top_p": 0.5}):
        for bits in ENDS:
            check(SamplingCase(x, bits=np.full(3, bits), **rule))


def test_independent_of_the_schedule(rng):
    x = logits(rng, 3, 2051)
    for rule in (RULES[4], RULES[5], {"top_k": 1500}):
        results = [launch_sampling(SamplingCase(x, seed=1, **rule), threads=160, seed=s, count=False) for s in range(3)]
        for other in results[1:]:
            for name in ("tokens", "logprobs", "filtered_logprobs", "valid"):
                np.testing.assert_array_equal(getattr(results[0], name), getattr(other, name))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_counted_traffic(rule, rng):
    """Each logit is read once where the row is staged; half staged, the other half is read twice."""
    rows, vocab = 2, 4096
    case = SamplingCase(logits(rng, rows, vocab, BF16), seed=1, **rule)
    counters = check(case, threads=128, count=True).counters
    row_bytes, tile = 2 * vocab * rows, 16 * 128 * rows  # the tile that the draw falls into
    assert counters.buffers[0].load_bytes - row_bytes == 2 * rows  # the drawn token's own logit
    case.staged_chunks = 256
    counters = check(case, threads=128, count=True).counters
    assert counters.buffers[0].load_bytes <= 1.5 * row_bytes + tile + 2 * rows


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype,spread", [(BF16, 3), (BF16, 1), (F32, 2)], ids=str)
def test_two_reads_of_long_rows(arch, dtype, spread, rng):
    """Launched as on the device, on rows that do not fit in shared memory."""
    vocab = 151936
    for rule in RULES:
        case = SamplingCase(logits(rng, 1, vocab, dtype, spread), bits=rng.integers(-(2**63), 2**63, 1), **rule)
        case.staged_chunks, threads = launch_shape(case, arch)
        counters = check(case, arch, threads=threads, count=True).counters
        assert counters.buffers[0].load_bytes <= 2.05 * vocab * dtype.itemsize, rule


@pytest.mark.parametrize("staged", [0, 128, None])
def test_brackets_that_miss(staged, rng):
    """Maxima far above and below what the first tiles promise, and rows of a few values: the search takes over."""
    x = logits(rng, 5, 3001)
    x[0, 2900] = 40  # beyond the highest bin
    x[1] -= 60
    x[1, 5] = 0  # all else is below the lowest bin
    x[2] = np.round(x[2] / 8)
    x[3, :2800] = -np.inf
    x[4] *= 1e-3
    for rule in ({"top_p": 0.9}, {"top_p": 0.9999999, "temperature": 0.3}, {"top_k": 800}, {"top_p": 0.6, "min_p": 0.2},
                 {"top_k": 900, "temperature": 1e-30}, {"top_p": 0.3, "temperature": 1e30}):  # fmt: skip
        for bits in (*ENDS, 987654321 << 31):
            check(SamplingCase(x, bits=np.full(5, bits), staged_chunks=staged, **rule), threads=64)


@pytest.mark.parametrize("barrier", [2, 3])
def test_race_check_sees_a_missing_barrier(barrier, tmp_path: Path, rng):
    """The kernel without one of its barriers is caught: the silence of the other tests means something."""
    text = Path(sampling_module("sm_90").path).read_text()
    start = text.index(".entry _ZN8distillm20sample_tokens_kernelIfE")
    lines = text[start:].splitlines()
    barriers = [n for n, line in enumerate(lines) if "bar.sync" in line or "barrier.sync" in line]
    lines[barriers[barrier]] = "//"
    (tmp_path / "racy.ptx").write_text(text[:start] + "\n".join(lines))
    module = ptxsim.load_ptx(tmp_path / "racy.ptx")
    case = SamplingCase(logits(rng, 1, 2051), top_k=20, seed=1)
    with pytest.raises(ptxsim.KernelError, match="race"):
        for seed in range(4):
            launch_sampling(case, threads=128, seed=seed, module=module, count=False)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_spills(arch):
    kernels = ptxas_report(arch, "sample_tokens.cu")
    assert len(kernels) == 3
    most = 65536 // 768 // 8 * 8  # registers come in eights; 768 threads share the 65536 of a multiprocessor
    assert [k for k in kernels if k.spill_bytes or k.stack_bytes or k.registers > most] == []
    assert all(k.static_shared_bytes <= 48 * 1024 < MAX_SHARED[int(arch[3:])] * 1024 for k in kernels)
