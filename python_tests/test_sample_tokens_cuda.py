"""The CUDA kernel of `sample_tokens`, executed from its PTX by ptxsim: the CPU kernel's tokens, without exception."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ptxsim
import pytest
from ptx_sampling import SamplingCase, launch_sampling, sampling_module
from sampling_cases import BF16, ENDS, F16, F32, RULES, check, logits, unaligned
from tiers import full


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(29)


@pytest.mark.parametrize("arch", ["sm_90", *full("sm_80")])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_dtypes_sizes_and_rules(arch, dtype, rng):
    for n, rule in enumerate(RULES):
        for vocab in (1, 2, 7, 31, 1023, 2051):
            case = SamplingCase(logits(rng, 3, vocab, dtype), seed=rng.integers(0, 99, 3), position=n, **rule)
            check(case, arch, threads=(32, 96, 256)[n % 3], seed=n)


@pytest.mark.parametrize("arch", ["sm_80", *full("sm_100", "sm_120")])
def test_other_architectures(arch, rng):
    for rule in RULES[:6]:
        check(SamplingCase(logits(rng, 2, 1023, BF16), seed=rng.integers(0, 99, 2), **rule), arch)


@pytest.mark.parametrize("rows", [1000, *full(35000)])
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
        results = [launch_sampling(SamplingCase(x, seed=1, **rule), threads=160, seed=s) for s in range(3)]
        for other in results[1:]:
            for name in ("tokens", "logprobs", "filtered_logprobs", "valid"):
                np.testing.assert_array_equal(getattr(results[0], name), getattr(other, name))


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


@pytest.mark.parametrize("barrier", [0, *full(3)])
def test_race_check_sees_a_missing_barrier(barrier, tmp_path: Path, rng):
    """The kernel without one of its barriers is caught: the silence of the other tests means something."""
    text = Path(sampling_module("sm_90", np.empty(0, np.float32)).path).read_text()
    start = text.index(".entry _ZN8distillm20sample_tokens_kernelIfE")
    lines = text[start:].splitlines()
    barriers = [n for n, line in enumerate(lines) if "bar.sync" in line or "barrier.sync" in line]
    lines[barriers[barrier]] = "//"
    (tmp_path / "racy.ptx").write_text(text[:start] + "\n".join(lines))
    module = ptxsim.load_ptx(tmp_path / "racy.ptx")
    case = SamplingCase(logits(rng, 1, 2051), top_k=20, seed=1)
    with pytest.raises(ptxsim.KernelError, match="race"):
        for seed in range(4):
            launch_sampling(case, threads=128, seed=seed, module=module)
