"""`sample_tokens` in teams: blocks that share a row where the hardware has no clusters. One read; the CPU's tokens."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_sampling import SamplingCase
from sampling_cases import F32, RULES, check, logits
from test_sample_tokens_traffic_cuda import FILTERS_OF_MANY, adversarial

TILE = 2048  # bytes, those of the tile that the draw or the last of equal logits falls into may be read again


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(37)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_more_rows_than_teams(size, rng):
    for n, rule in enumerate([*RULES, *FILTERS_OF_MANY]):
        x = logits(rng, 5, (2051, 5003, 31)[n % 3], F32)
        x[2] = np.nan
        check(SamplingCase(x, seed=n, cluster=size, **rule), "sm_80", threads=64, seed=n, teams=2)


@pytest.mark.parametrize("rule", FILTERS_OF_MANY, ids=str)
def test_adversarial_rows_are_read_once(rule, rng):
    x = adversarial(rng, 6000)
    case = SamplingCase(x, bits=np.full(len(x), 1 << 62), cluster=4, **rule)
    counters = check(case, "sm_80", threads=96, count=True).counters
    assert counters.buffers[0].load_bytes <= x.nbytes + len(x) * (4 * TILE + 4)
