"""Counters against figures worked out by hand."""

import numpy as np
import pytest
from ptxsim.tests.support import ARCHITECTURES, compiled


def launch(kernel, grid, block, args, arch="sm_90", **options):
    return compiled("counting.cu", arch).launch(kernel, grid, block, args, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", (0, 5))
def test_vector_add(arch, seed):
    n = 1024
    a, b = np.arange(n, dtype=np.float32), np.ones(n, np.float32)
    out = np.zeros(n, np.float32)
    c = launch("vector_add", 8, 128, [a, b, out, n], arch, seed=seed, readonly=[a, b])
    assert (out == a + 1).all()
    assert (c.load_bytes, c.store_bytes, c.atomic_bytes) == (8 * n, 4 * n, 0)
    assert (c.load_sectors, c.store_sectors) == (8 * n // 32, 4 * n // 32)
    assert c.load_efficiency == c.store_efficiency == 1.0
    assert (c.unique_load_bytes, c.unique_store_bytes) == (8 * n, 4 * n)
    assert c.instructions["ld_global"] == 2 * n and c.warp_instructions["ld_global"] == 2 * n // 32
    assert c.instructions["st_global"] == n
    assert c.instructions["fp32_add"] == n and c.warp_instructions["fp32_add"] == n // 32
    assert c.group("mufu_") == 0 and c.blocks == 8 and c.threads == n
    assert [b.times_read for b in c.buffers] == [1, 1, 0]
    assert [b.times_written for b in c.buffers] == [0, 0, 1]


def test_instructions_by_source_line():
    n = 1024
    a, out = np.ones(n, np.float32), np.zeros(n, np.float32)
    c = launch("vector_add", 8, 128, [a, a, out, n])
    assert sum(c.lines.values()) == c.issued_warp_instructions
    mine = [count for chain, count in c.lines.items() if chain and chain[0].endswith("counting.cu:4")]
    assert sum(mine) >= 4 * n // 32  # two loads, an addition, a store, and the addresses


def test_partial_block():
    n = 100  # the last warp has 4 active lanes
    a = np.ones(n, np.float32)
    c = launch("vector_add", 1, 128, [a, a, np.zeros(n, np.float32), n])
    assert c.load_bytes == 8 * n and c.instructions["fp32_add"] == n
    assert c.warp_instructions["fp32_add"] == 4
    assert c.load_sectors == 2 * (3 * 4 + 1)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_strided_copy(stride, sectors):
    n = 256
    x, out = np.arange(n * stride, dtype=np.float32), np.zeros(n, np.float32)
    c = launch("strided_copy", 2, 128, [x, out, stride])
    assert (out == x[::stride]).all()
    assert c.load_bytes == 4 * n and c.load_sectors == sectors * n // 32
    assert c.load_efficiency == pytest.approx(4 * 32 / (32 * sectors))
    assert c.store_efficiency == 1.0
    (load,) = [s for s in c.sites if s.access == "load global"]
    assert load.global_requests == n // 32 and load.source.count("counting.cu")


@pytest.mark.parametrize("seed", (0, 5))
def test_repeated_reads(seed):
    n = 512
    x, out = np.ones((n, 4), np.float32), np.zeros((64, 4), np.float32)
    c = launch("read_twice", 1, 64, [x, out, n], seed=seed)
    assert c.buffers[0].times_read == 2.0 and c.buffers[0].unique_load_bytes == 16 * n
    assert c.load_bytes == 2 * 16 * n and c.load_sectors == 2 * 16 * n // 32
    assert c.instructions["ld_global"] == 2 * n and c.instructions["fp32_add"] == 8 * n


def test_special_functions():
    c = launch("exponentials", 1, 32, [np.ones(64, np.float32), np.zeros(32, np.float32)])
    assert c.instructions["mufu_ex2"] == 32 and c.instructions["mufu_rsqrt"] == 32
    assert c.group("mufu_") == 64 and c.group("mufu_", warps=True) == 2


@pytest.mark.parametrize("width, writes", [(32, 32), (33, 1)])
def test_bank_conflicts(width, writes):
    c = launch(f"columns<{width}>", 1, 32, [np.zeros(32, np.float32)])
    stores = [s for s in c.sites if s.access == "store shared"]
    loads = [s for s in c.sites if s.access == "load shared"]
    assert {s.bank_conflict_degree for s in stores} == {writes}
    assert {s.bank_conflict_degree for s in loads} == {1.0}
    assert sum(s.shared_bytes for s in loads) == 32 * 32 * 4
    assert c.wavefronts == 32 * writes + 32


def test_half_warp():
    x, out = np.ones(64, np.float32), np.zeros(64, np.float32)
    c = launch("half_warp", 1, 64, [x, out])
    assert c.load_bytes == 32 * 4 and c.load_sectors == 2 * 2
    assert c.warp_instructions["ld_global"] == 2 and c.unique_load_bytes == 128


def test_roofline():
    n = 1 << 16
    a = np.ones(n, np.float32)
    c = launch("vector_add", n // 256, 256, [a, a.copy(), np.zeros_like(a), n])
    h100 = c.roofline("H100-SXM")
    assert h100.bounds["dram"] == pytest.approx(12 * n / 3.35e12)
    assert h100.bounds["fp32"] == pytest.approx(n / (128 * 132 * 1.755e9))
    assert h100.bounds["mufu"] == 0 and h100.limiter == "dram" and h100.sms_used == 132
    assert c.roofline("A100-40GB").bounds["fp32"] == pytest.approx(n / (64 * 108 * 1.41e9))
    assert c.roofline("A100-80GB").seconds == pytest.approx(12 * n / 2.039e12)
    assert c.roofline("B200").seconds == pytest.approx(12 * n / 8e12)
    text = c.report(elements=n, show=False)
    assert "global bytes loaded                 8.0000  efficiency 1.000" in text


def test_count_false():
    a = np.ones(32, np.float32)
    c = launch("vector_add", 1, 32, [a, a, np.zeros_like(a), 32], count=False)
    assert not c.counted and c.load_bytes == 0 and not c.instructions
