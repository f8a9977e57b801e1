"""What the CUDA kernel of `sample_tokens` reads, counted by ptxsim, and clusters of blocks for long rows."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_sampling import SamplingCase, planned
from sampling_cases import BF16, ENDS, F32, RULES, check, logits, unaligned

FILTERS_OF_MANY = [{"top_k": 1500, "top_p": 0.7}, {"top_k": 2000}, {"top_p": 0.6, "min_p": 0.2}]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(31)


LONG_ROWS = [pytest.param(*row, marks=pytest.mark.slow) for row in ((BF16, 1), (F32, 2))]


def adversarial(rng, vocab: int) -> np.ndarray:
    """Rows of which counts in bins tell little: all equal, two values, differing in the last bits, half of it -inf,
    all within a few bins, ascending."""
    equal = np.full(vocab, 1.5, np.float32)
    two = np.where(rng.random(vocab) < 0.5, np.float32(-2), np.float32(1))
    last_bit = (np.float32(1).view(np.int32) + rng.integers(0, 16, vocab, np.int32)).view(np.float32)
    half = rng.standard_normal(vocab).astype(np.float32)
    half[: vocab // 2] = -np.inf
    flat = (rng.standard_normal(vocab) * 1e-3).astype(np.float32)
    ascending = np.sort(rng.standard_normal(vocab).astype(np.float32) * 3)
    return np.stack([equal, two, last_bit, half, flat, ascending])


@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_clusters_draw_the_same_tokens(cluster, rng):
    """Rows of 1 to 10 tiles on the blocks of a cluster, under several schedules."""
    for n, rule in enumerate([*RULES, *FILTERS_OF_MANY]):
        vocab = (2051, 5003, 31)[n % 3]
        case = SamplingCase(logits(rng, 2, vocab), seed=n, cluster=cluster, **rule)
        counters = check(case, threads=64, seed=n).counters
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
        counters = check(case, threads=96).counters
        assert counters.buffers[0].load_bytes == x.nbytes + 4 * len(x)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_counted_traffic(rule, rng):
    """Each logit is read once where the row is staged; half staged, the other half is read twice."""
    rows, vocab = 2, 4096
    case = SamplingCase(logits(rng, rows, vocab, BF16), seed=1, **rule)
    counters = check(case, threads=128).counters
    row_bytes, tile = 2 * vocab * rows, 16 * 128 * rows  # the tile that the draw falls into
    assert counters.buffers[0].load_bytes - row_bytes == 2 * rows  # the drawn token's own logit
    case.staged_chunks = 256
    counters = check(case, threads=128).counters
    assert counters.buffers[0].load_bytes <= 1.5 * row_bytes + 2 * tile + 2 * rows  # a tile: the sample


@pytest.mark.parametrize("dtype,spread", [(BF16, 3), *LONG_ROWS], ids=str)
def test_two_reads_of_long_rows_without_clusters(dtype, spread, rng):
    """Launched as on the device, on rows that do not fit in a block's shared memory."""
    vocab = 151936
    for rule in RULES:
        case = SamplingCase(logits(rng, 1, vocab, dtype, spread), bits=rng.integers(-(2**63), 2**63, 1), **rule)
        case, threads = planned(case, "sm_80")
        assert case.cluster == 1
        counters = check(case, "sm_80", threads=threads).counters
        assert counters.buffers[0].load_bytes <= 2.05 * vocab * dtype.itemsize, rule


@pytest.mark.parametrize("dtype,cluster", [(BF16, 2), (F32, 4)], ids=str)
def test_one_read_of_long_rows_with_clusters(dtype, cluster, rng):
    vocab = 151936
    for rule in RULES[4::3]:
        case = SamplingCase(logits(rng, 1, vocab, dtype), bits=rng.integers(-(2**63), 2**63, 1), **rule)
        case, threads = planned(case, "sm_90")
        assert case.cluster == cluster
        counters = check(case, threads=threads).counters
        assert counters.buffers[0].load_bytes == (vocab + 1) * dtype.itemsize, rule


OTHER_PLANS = [
    pytest.param(*plan, marks=pytest.mark.slow)
    for plan in (
        ("sm_80", 32000, F32, 1, True),
        ("sm_86", 50257, BF16, 1, False),
        ("sm_100", 262144, F32, 8, True),
        ("sm_120", 151936, BF16, 8, True),
    )
]


@pytest.mark.parametrize(
    "arch,vocab,dtype,cluster,whole",
    [
        ("sm_90", 1, F32, 1, True),
        ("sm_90", 50257, BF16, 1, True),
        ("sm_90", 151936, BF16, 2, True),
        ("sm_90", 151936, F32, 4, True),
        ("sm_90", 2**20 - 1, F32, 1, False),
        ("sm_80", 50257, BF16, 1, True),
        ("sm_80", 151936, BF16, 1, False),
        *OTHER_PLANS,
    ],
)
def test_plan_of_the_launch(arch, vocab, dtype, cluster, whole):
    """One block where it has room, else the smallest cluster, else one block that keeps a part."""
    case, threads = planned(SamplingCase(np.zeros((1, vocab), dtype)), arch)
    assert threads % 32 == 0 and 32 <= threads <= 640
    assert (case.cluster, case.staged_chunks * case.cluster >= case.chunks()) == (cluster, whole)


def test_plan_of_the_launch_without_clusters():
    case, _ = planned(SamplingCase(np.zeros((1, 262144), F32)), "sm_90", clusters=False)
    assert case.cluster == 1 and case.staged_chunks < case.chunks()


@pytest.mark.parametrize(
    "rule",
    [
        *FILTERS_OF_MANY[1:],
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 250},
        {"top_k": 5000},
        {"top_p": 0.97},
        {"top_p": 0.1},
    ],
    ids=str,
)
def test_two_reads_of_adversarial_rows_without_clusters(rule, rng):
    x = adversarial(rng, 12000)
    for bits in ENDS:
        case = SamplingCase(x, bits=np.full(len(x), bits), staged_chunks=256, **rule)
        counters = check(case, threads=64).counters
        unstaged = x.nbytes - len(x) * 256 * 16
        tiles = (2 * 2048 + 64 * 16) * len(x)  # those of the last tie and of the draw, and the sample
        assert counters.buffers[0].load_bytes <= x.nbytes + unstaged + tiles + 4 * len(x)
