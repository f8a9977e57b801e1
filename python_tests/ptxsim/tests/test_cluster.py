"""Thread-block clusters, distributed shared memory, mbarriers."""

import numpy as np
import ptxsim
import pytest
from ptxsim.tests.support import CLUSTER_ARCHITECTURES, compiled

pytestmark = pytest.mark.parametrize("arch", CLUSTER_ARCHITECTURES)
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_reduction(arch, seed, rng):
    x, out = rng.standard_normal((3, 1000)).astype(np.float32), np.zeros((3, 2), np.float32)
    sim = compiled("cluster.cu", arch)
    sim.launch("cluster_sum", 12, 64, [x, out, 1000], shared_bytes=64 * 4, seed=seed, readonly=[x])
    sums = x.astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(out[:, 0], sums, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(out[:, 1], sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", (1, 2, 8))
def test_shared_cluster_addresses(arch, seed, size):
    x, out = np.arange(8 * 32, dtype=np.int32), np.zeros(8 * 32, np.int32)
    compiled("cluster.cu", arch).launch("cluster_ring", 8, 32, [x, out], cluster=(size,), seed=seed)
    assert (out == 10 * x).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_cluster_barrier_is_a_race(arch, seed):
    """Without the second barrier each value would still be right: only the exit is unordered."""
    sim = compiled("cluster.cu", arch)
    text = open(sim.path).read()
    start = text.index("entry cluster_ring")
    first = text.index("barrier.cluster.arrive.release.aligned", start)
    end = text.index("wait.acquire.aligned;", first) + len("wait.acquire.aligned;")
    broken = ptxsim.Simulator(text[:first] + text[end:])
    x, out = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    with pytest.raises(ptxsim.KernelError, match="race on shared memory|has exited"):
        broken.launch("cluster_ring", 2, 32, [x, out], cluster=(2,), seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarrier(arch, seed):
    x, out = np.arange(96, dtype=np.int32), np.zeros((3, 96), np.int32)
    compiled("cluster.cu", arch).launch("mbarrier_handover", 1, 96, [x, out], seed=seed)
    assert (out == np.tile(x.reshape(3, 1, 32), (1, 3, 1)).reshape(3, 96)).all()


def test_cluster_shape_is_checked(arch):
    x, out = np.zeros(64, np.float32), np.zeros(2, np.float32)
    sim = compiled("cluster.cu", arch)
    with pytest.raises(ValueError, match="multiple of the cluster"):
        sim.launch("cluster_sum", 3, 64, [x, out, 64], shared_bytes=256)
    with pytest.raises(ValueError, match="declares cluster"):
        sim.launch("cluster_sum", 4, 64, [x, out, 64], shared_bytes=256, cluster=(2,))
