"""Kernels made of libcu++, cooperative groups and CUB parts; the race check must stay silent."""

import numpy as np
import pytest
from ptxsim.tests.support import ARCHITECTURES, compiled

pytestmark = [
    pytest.mark.parametrize("arch", ARCHITECTURES),
    pytest.mark.parametrize("seed", (0, 2)),
]


@pytest.fixture
def x(rng):
    return rng.integers(-1000, 1000, 256).astype(np.int32)


def run(arch, seed, kernel, block, args):
    compiled("library.cu", arch).launch(kernel, 1, block, args, seed=seed)


def test_barrier_object(arch, seed, x):
    out = np.zeros(192, np.int32)
    run(arch, seed, "barrier_rounds", 64, [x, out])
    assert (out.reshape(3, 64) == x[:192].reshape(3, 64)[:, ::-1]).all()


def test_group_scan(arch, seed, x):
    out = np.zeros(32, np.int32)
    run(arch, seed, "group_scan", 32, [x, out])
    assert (out == np.cumsum(x[:32]) - x[:32]).all()


def test_atomics(arch, seed):
    out = np.zeros(4, np.int32)
    run(arch, seed, "atomics", 32, [out])
    assert out[0] in (32, *range(36, 110)) and out.view(np.float32)[1] == 32
    assert out.view(np.float64)[1] == 32


def test_pipeline_object(arch, seed, x):
    out = np.zeros(64, np.int32)
    run(arch, seed, "pipeline_sum", 64, [x, out])
    assert (out == x.reshape(4, 64).sum(axis=0)).all()


def test_sort_pairs(arch, seed, rng):
    x, out = rng.standard_normal(1024).astype(np.float32), np.zeros(2048, np.float32)
    run(arch, seed, "sort_pairs", 128, [x, out])
    assert (out[:1024] == np.sort(x)[::-1]).all() and (
        x[out[1024:].astype(int)] == out[:1024]
    ).all()


def test_merge_sort(arch, seed, x):
    out = np.zeros(256, np.int32)
    run(arch, seed, "merge_sort", 64, [x, out])
    assert (out == np.sort(x)).all()


def test_load_and_reduce(arch, seed, x):
    out = np.zeros(257, np.int32)
    run(arch, seed, "load_and_reduce", 64, [x, out])
    assert (out[1:] == x).all()
    assert out[0] == (x.reshape(64, 4) * [1, 2, 3, 4]).sum(axis=1).max()
