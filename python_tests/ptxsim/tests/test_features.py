"""CUDA features, one by one."""

import math
from functools import reduce

import numpy as np
import ptxsim
import pytest
from ptxsim.tests.support import ARCHITECTURES, compiled

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


@pytest.fixture
def x(rng):
    return rng.standard_normal(1000).astype(np.float32)


def run(arch, kernel, grid, block, args, file="features.cu", **options):
    return compiled(file, arch).launch(kernel, grid, block, args, **options)


@pytest.mark.parametrize("seed", (0, 3))
def test_cooperative_groups(arch, seed, x):
    out = np.zeros(1, np.float32)
    run(arch, "cg_sum", 1, 128, [x, out, 1000], seed=seed)
    assert abs(out[0] - x.sum()) < 1e-3


@pytest.mark.parametrize("seed", (0, 3))
def test_sub_warp_tiles(arch, seed, x):
    out = np.zeros(64, np.float32)
    run(arch, "cg_tiles", 1, 64, [x, out], seed=seed)
    sums = x[:64].reshape(8, 8).astype(np.float64).sum(axis=1) * np.tile([1, 2], 4)
    expected = np.repeat(np.abs(sums), 8)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", (0, 3))
def test_cub(arch, seed, x):
    out = np.zeros(200, np.float32)
    run(arch, "cub_block", 1, 128, [x, out, 1000], file="cub.cu", seed=seed)
    assert abs(out[0] - x.sum()) < 1e-3
    assert (out[1:129] == np.concatenate([[0], np.cumsum(x[:128] > 0)[:-1]])).all()


@pytest.mark.parametrize("seed", (0, 3))
def test_cub_sort(arch, seed, rng):
    keys = rng.integers(0, 2**32, 256, dtype=np.uint32)
    out = np.zeros_like(keys)
    run(arch, "cub_sort", 1, 64, [keys, out], file="cub.cu", seed=seed, readonly=[keys])
    assert (out == np.sort(keys)).all()


def test_math_library(arch, x):
    out = np.zeros_like(x)
    run(arch, "math", 4, 256, [x, out, 1000])
    d, f = x.astype(np.float64), np.float32
    a = np.abs(d)
    expected = (
        np.exp(d) + np.log(a + 1) + np.log1p(a) + np.expm1(d) + np.tanh(d)
        + np.vectorize(math.erf)(d) + np.sqrt(a) + 1 / np.sqrt(a + 1) + a ** f(1.3) + np.log(a + 2)
        + 1 / (d + 10) + np.fmod(d, f(1.7)) + np.exp2(d) + np.log2(a + f(0.1)) + d / 3
        + np.sign(d) * np.floor(a + 0.5) + np.rint(d)
    )  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def test_trigonometry(arch, x):
    out = np.zeros(128, np.float32)
    run(arch, "trig", 1, 128, [x, out, 128])
    big = (x[:128] * np.float32(1e6)).astype(np.float64)
    np.testing.assert_allclose(out, np.sin(x[:128].astype(np.float64)) + np.cos(big), atol=1e-5)


def test_local_array(arch, x):
    out = np.zeros(64, np.float32)
    run(arch, "local_array", 1, 32, [x, out, 1000, 2])
    assert (out[:32] == [np.sort(x[t::32])[::-1][2] for t in range(32)]).all()


def test_device_function(arch, x):
    out = np.zeros(32, np.float32)
    run(arch, "noinline_call", 1, 32, [x, out, 3])
    expected = x[:32].astype(np.float64)
    for _ in range(3):
        expected = expected * 1.5 + 1
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("seed", (0, 3))
def test_last_block(arch, seed, x):
    part, out = np.zeros(8, np.float32), np.zeros(1, np.float32)
    run(arch, "last_block", 8, 32, [x, part, out, 1000], seed=seed)
    assert abs(out[0] - x.sum()) < 1e-3


@pytest.mark.parametrize("seed", (0, 3))
def test_pipeline(arch, seed, x):
    out = np.zeros(1, np.float32)
    run(arch, "pipeline", 1, 64, [x, out, 250], shared_bytes=2 * 64 * 16, seed=seed)
    assert abs(out[0] - x.sum()) < 1e-3


def test_half_pairs(arch, rng):
    bf16 = pytest.importorskip("ml_dtypes").bfloat16
    h, b = rng.standard_normal(64).astype(np.float16), rng.standard_normal(64).astype(bf16)
    out_h, out_b = np.zeros_like(h), np.zeros_like(b)
    run(arch, "half_pairs", 1, 32, [h, b, out_h, out_b, 32])
    d = h.astype(np.float64)
    addend = (d + 0.5).astype(np.float16).astype(np.float64)
    assert (out_h == np.minimum((d * d + addend).astype(np.float16), h)).all()

    def rounded(v):
        return v.astype(np.float32).astype(bf16)

    d = b.astype(np.float64)
    product = rounded(d * d).astype(np.float64)
    largest = np.maximum(rounded(d * d + product).astype(np.float64), d)
    scaled = (b.astype(np.float32) * np.tile([2, 3], 32).astype(np.float32)).astype(bf16)
    assert (out_b == rounded(largest + scaled.astype(np.float64))).all()


def test_half_compare(arch, rng):
    bf16 = pytest.importorskip("ml_dtypes").bfloat16
    h, b = rng.standard_normal(64).astype(np.float16), rng.standard_normal(32).astype(bf16)
    out = np.zeros(32, np.uint32)
    run(arch, "half_compare", 1, 32, [h, b, out])
    low, high = h[0::2] > 0, h[1::2] > 0
    assert (out == (low | high << 1 | (low & high) << 2 | (b < 0) << 3)).all()


def test_half_atomics(arch):
    bf16 = pytest.importorskip("ml_dtypes").bfloat16
    one, pair, largest = np.zeros(2, bf16), np.zeros(2, bf16), np.zeros(1, np.float32)
    run(arch, "half_atomics", 2, 32, [one, pair, largest])
    assert (float(one[0]), float(pair[0]), float(pair[1]), largest[0]) == (64, 64, 128, 1)


def integer_reference(value, values):
    mask, u = 0xFFFFFFFF, value & (2**64 - 1)
    low, high = u & mask, u >> 32
    quotient, remainder = divmod(abs(value), 12345)
    quotient, remainder = (-quotient, remainder) if value >= 0 else (quotient, -remainder)
    same = sum(1 << j for j in range(32) if values[j] & 3 == value & 3)
    byte = [u >> 8 * k & 255 for k in range(8)]
    permuted = byte[5] | byte[7] << 8 | byte[1] << 16 | byte[3] << 24
    return mask & (
        quotient ^ remainder ^ same ^ int(f"{low:032b}"[::-1], 2) ^ 32 - low.bit_length()
        ^ (low & -low).bit_length() ^ permuted ^ (high << 7 | low >> 25) & mask
        ^ u.bit_count() ^ 64 - u.bit_length() ^ u * 0x9E3779B97F4A7C15 >> 64
    )  # fmt: skip


def test_integers(arch, rng):
    values = rng.integers(-(2**62), 2**62, 32).astype(np.int64)
    out = np.zeros(48, np.uint32)
    run(arch, "integers", 1, 32, [values, out, 32, np.int64(-12345)])
    numbers = [int(v) for v in values]
    expected = [integer_reference(v, numbers) for v in numbers]
    assert [int(v) for v in out[:32]] == expected
    assert out.view(np.int32)[32] == max(0, *np.array(expected, np.uint32).view(np.int32))
    assert int(out[33]) in expected
    assert int(out[34]) == reduce(lambda a, b: a ^ b, expected)
    assert int(out[36]) | int(out[37]) << 32 == sum(expected)


def test_printf_and_assert(arch, x, capfd):
    run(arch, "printing", 1, 32, [None, 0])
    assert capfd.readouterr().out == "thread 3 of 32: 1.500 -7 ok%\n"
    out = np.zeros(32, np.float32)
    run(arch, "asserting", 1, 32, [x, out, 10])
    assert (out == x[:32]).all()
    with pytest.raises(ptxsim.KernelError, match="n < 100"):
        run(arch, "asserting", 1, 32, [x, out, 100])


def test_struct_parameter(arch, x):
    out = np.zeros(32, np.float32)
    options = ptxsim.Struct(x, np.float32(2), np.int16(5), np.float64(0.25))
    run(arch, "struct_parameter", 1, 32, [options, out])
    np.testing.assert_allclose(out, x[5:37] * 2 + 0.25, rtol=1e-6)


def test_null_pointer_in_struct(arch, x):
    out = np.zeros(32, np.float32)
    options = ptxsim.Struct(None, np.float32(2), np.int16(5), np.float64(0.25))
    with pytest.raises(ptxsim.KernelError, match="null pointer"):
        run(arch, "struct_parameter", 1, 32, [options, out])


@pytest.mark.parametrize("field", [2.0, 5, True, "x"])
def test_struct_fields_need_a_type(arch, x, field):
    options = ptxsim.Struct(x, np.float32(2), field, np.float64(0.25))
    with pytest.raises(TypeError, match="struct field of type"):
        run(arch, "struct_parameter", 1, 32, [options, np.zeros(32, np.float32)])


def test_block_votes(arch, rng):
    values, out = rng.integers(-50, 50, 96).astype(np.int32), np.zeros(3, np.int32)
    run(arch, "block_votes", 1, 96, [values, out])
    assert out.tolist() == [np.count_nonzero(values > 0), 1, 0]


def test_switch(arch):
    values, out = np.arange(64, dtype=np.int32) % 9, np.zeros(80, np.int32)
    run(arch, "switches", 1, 64, [values, out])
    table = [11, 7, 5, 99, 1, 2, 3, -1, -1]
    assert out[:64].tolist() == [table[v] for v in values]


def test_128_bit_integers(arch, rng):
    a = rng.integers(0, 2**64, 4, dtype=np.uint64)
    out = np.zeros(6, np.uint64)
    run(arch, "wide_integers", 1, 1, [a, out])
    x, y = int(a[0]) << 64 | int(a[1]), int(a[2]) << 64 | int(a[3])
    for n, value in enumerate((x + y, x - y, x * y)):
        assert int(out[2 * n]) << 64 | int(out[2 * n + 1]) == value % 2**128
