"""Whole kernels against numpy, for every architecture and under random schedules."""

from pathlib import Path

import numpy as np
import pytest
from ptxsim.tests.support import ARCHITECTURES, compiled, softmax_reference

try:
    import ml_dtypes

    BFLOAT16 = ml_dtypes.bfloat16
except ImportError:
    BFLOAT16 = None

SEEDS = (0, 1, 7)


def softmax_error(
    arch, kernel, dtype, rows, columns, threads, rng, smallest=0.0, **options
):  # fmt: skip
    """Largest relative error; errors up to `smallest` are allowed anyway."""
    x = (rng.standard_normal((rows, columns)) * 3).astype(dtype)
    out = np.zeros_like(x)
    sim = compiled("basic.cu", arch)
    sim.launch(kernel, rows, threads, [x, out, np.int32(columns)], readonly=[x], **options)
    expected = softmax_reference(x)
    excess = np.abs(out.astype(np.float64) - expected) - smallest
    return (excess / expected).max()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_f32(arch, seed, rng):
    error = softmax_error(arch, "softmax_rows<float>", np.float32, 3, 4096, 256, rng, seed=seed)
    assert error < 1e-5


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_f16(arch, seed, rng):
    kernel, half_ulp = "softmax_rows<__half>", 2.0**-25  # of subnormal results
    error = softmax_error(
        arch, kernel, np.float16, 3, 1024, 128, rng, smallest=half_ulp * 1.01, seed=seed
    )
    assert error < 2**-11 * 1.01


@pytest.mark.skipif(BFLOAT16 is None, reason="needs ml_dtypes")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_bf16(arch, seed, rng):
    kernel = "softmax_rows<__nv_bfloat16>"
    assert softmax_error(arch, kernel, BFLOAT16, 3, 4096, 256, rng, seed=seed) < 2**-8 * 1.01


def philox_word(row):
    c, k = [row, 7, 0, 0], [0x1234567, 0x89ABCDEF]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0] ^ c[1] ^ c[2] ^ c[3]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_radix_select(arch, seed, rng):
    rows, columns, k = 3, 4096, 50
    x = (rng.standard_normal((rows, columns)) * 3).astype(np.float32)
    threshold, random = np.zeros(rows, np.uint32), np.zeros(rows, np.uint32)
    greater, total = np.zeros(rows, np.int32), np.zeros(rows, np.float32)
    compiled("basic.cu", arch).launch(
        "radix_select", rows, 128, [x, threshold, greater, random, total, columns, k],
        shared_bytes=1024, readonly=[x], seed=seed,
    )  # fmt: skip
    kth = np.ascontiguousarray(-np.sort(-x, axis=1)[:, k - 1])
    word = kth.view(np.uint32)
    assert (threshold == np.where(word >> 31, ~word, word | 0x80000000)).all()
    assert (greater == k - 1).all()
    sums = np.where(x > kth[:, None], x, 0).astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(total, sums, rtol=1e-5)
    assert [int(v) for v in random] == [philox_word(r) for r in range(rows)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_cp_async(arch, seed, rng):
    x = rng.standard_normal((2, 4096)).astype(np.float32)
    out = np.zeros(2, np.float32)
    sim = compiled("basic.cu", arch)
    args = [x, out, np.int32(4096)]
    sim.launch("cpasync_sum", 2, 128, args, shared_bytes=4096 * 4, readonly=[x], seed=seed)
    np.testing.assert_allclose(out, x.astype(np.float64).sum(axis=1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [{"count": False}, {"check_races": False}])
def test_without_counters_or_race_check(options, rng):
    kernel = "softmax_rows<float>"
    assert softmax_error("sm_90", kernel, np.float32, 2, 1024, 96, rng, **options) < 1e-5


def test_ucontext_fallback(monkeypatch, rng):
    """Without Boost.Context the scheduler uses ucontext (in another process: flags are cached)."""
    import subprocess
    import sys

    code = (
        "from ptxsim.tests import test_kernels; import numpy as np; rng = np.random.default_rng(0);"
        "k, f = 'softmax_rows<float>', np.float32;"
        "e = test_kernels.softmax_error('sm_90', k, f, 1, 512, 64, rng);"
        "import ptxsim.module as m; assert m._context_flags() == () and e < 1e-5, e"
    )
    monkeypatch.setenv("PTXSIM_UCONTEXT", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    subprocess.run([sys.executable, "-c", code], check=True)
