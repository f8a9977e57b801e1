"""What the CUDA kernel of `sample_tokens` reads, counted by ptxsim, and clusters of blocks for long rows."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_sampling import SamplingCase, planned
from sampling_cases import BF16, ENDS, F16, F32, RULES, check, logits, unaligned

FILTERS_OF_MANY = [{"top_k": 1500, "top_p": 0.7}, {"top_k": 2000}, {"top_p": 0.6, "min_p": 0.2}]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


def adversarial(rng, vocab: int, dtype=F32) -> np.ndarray:
    """Rows that histograms tell little about: all equal, two values, differing in the last bit, half of it -inf, and a
    few values far from the first tiles'."""
    equal = np.full(vocab, 1.5, np.float32)
    two = np.where(rng.random(vocab) < 0.5, np.float32(-2), np.float32(1))
    last_bit = (np.float32(1).view(np.int32) + rng.integers(0, 16, vocab, np.int32)).view(np.float32)
    half = rng.standard_normal(vocab).astype(np.float32)
    half[: vocab // 2] = -np.inf
    flat = (rng.standard_normal(vocab) * 1e-3).astype(np.float32)
    return np.stack([equal, two, last_bit, half, flat]).astype(dtype)


@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_clusters_draw_the_same_tokens(cluster, rng):
    """Rows of 1 to 10 tiles on the blocks of a cluster, under several schedules."""
    for n, rule in enumerate([*RULES, *FILTERS_OF_MANY]):
        vocab = (2051, 5003, 31)[n % 3]
        case = SamplingCase(logits(rng, 2, vocab), seed=n, cluster=cluster, **rule)
        counters = check(case, threads=64, seed=n, count=n < 3).counters
        if n < 3:
            assert counters.buffers[0].load_bytes == 2 * 4 * vocab + 2 * 4


def test_clusters_with_layouts_and_lists(rng):
    for n, (dtype, at) in enumerate(((F32, 3), (BF16, 5))):
        view = unaligned(logits(rng, 2, 4099, dtype), at)
        banned, previous = rng.random(4099) < 0.3, rng.integers(-3, 4200, (2, 40))
        for rule in (RULES[0], RULES[2], RULES[4], RULES[5], FILTERS_OF_MANY[0]):
            case = SamplingCase(view, seed=n, cluster=2, banned=banned, previous_tokens=previous, **rule)
            case.repetition_penalty = 1.3
            check(case, threads=96, seed=n)


def test_clusters_and_unusable_rows(rng):
    x = logits(rng, 4, 3001)
    x[0] = -np.inf
    x[1, 2999] = np.nan
    x[2, 0] = np.inf
    for rule in (RULES[0], RULES[2], RULES[4], RULES[5]):
        result = check(SamplingCase(x, seed=3, cluster=2, **rule), threads=32, seed=1)
        assert result.valid.tolist() == [False] * 3 + [True]
    illegal = SamplingCase(x, cluster=2, temperature=np.full(4, -1, np.float32))
    assert not check(illegal, threads=32).valid.any()


@pytest.mark.parametrize("rule", FILTERS_OF_MANY, ids=str)
def test_clusters_read_adversarial_rows_once(rule, rng):
    x = adversarial(rng, 6000)
    for bits in ENDS:
        case = SamplingCase(x, bits=np.full(len(x), bits), cluster=4, **rule)
        counters = check(case, threads=96, count=True).counters
        assert counters.buffers[0].load_bytes == x.nbytes + 4 * len(x)
