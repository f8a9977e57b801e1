"""Cooperative launches: all blocks of the grid run together and wait for each other through global memory."""

import numpy as np
import ptxsim
import pytest
from ptxsim.tests.support import compiled
from ptxsim.tests.test_negative import delete

BLOCKS, ROUNDS = 4, 6
SPINS = ({}, {"ATOMIC_SPIN": 1}, {"VOLATILE_SPIN": 1})


def sums(sim, seed, buffers=2, first=0, **options):
    x = np.random.default_rng(seed).integers(0, 1000, (ROUNDS, BLOCKS)).astype(np.int32)
    boxes, counter = np.zeros((buffers, BLOCKS), np.int32), np.array([first], np.uint32)
    out = np.zeros_like(x)
    sim.launch(
        "grid_sums", BLOCKS, 64, [x, boxes, counter, out, ROUNDS, buffers], seed=seed, readonly=[x],
        cooperative=True, **options,
    )  # fmt: skip
    return out, 2 * np.tile(x.sum(axis=1, keepdims=True), (1, BLOCKS))


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_120"))
@pytest.mark.parametrize("spin", SPINS, ids=str)
def test_barrier_of_the_grid(arch, spin):
    sim = compiled("cooperative.cu", arch, **spin)
    for seed in range(6):
        out, expected = sums(sim, seed, count=seed % 2 == 0)
        np.testing.assert_array_equal(out, expected)


def test_counter_wraps_around():
    out, expected = sums(compiled("cooperative.cu", "sm_80"), 1, first=2**32 - 2 * BLOCKS)
    np.testing.assert_array_equal(out, expected)


def caught(sim, message, seeds=8, **options):
    """How many of the schedules end with this error."""
    count = 0
    for seed in range(seeds):
        try:
            sums(sim, seed, **options)
        except ptxsim.KernelError as error:
            assert message in str(error), error
            count += 1
    return count


def test_race_between_blocks():
    """One buffer is not enough: a block may write for the next round what another has yet to read."""
    assert caught(compiled("cooperative.cu", "sm_80"), "race on global memory, buffer arg1", buffers=1) >= 6


def test_wrong_sums_of_a_race():
    """The schedules let a block fall so far behind that the race shows in the values too."""
    results = [sums(compiled("cooperative.cu", "sm_80"), seed, buffers=1, check_races=False) for seed in range(8)]
    assert any((out != expected).any() for out, expected in results)


@pytest.mark.parametrize("fault", ("MISSING_RELEASE", "MISSING_ACQUIRE", "MISSING_WAIT"))
def test_barriers_that_order_nothing(fault):
    assert caught(compiled("cooperative.cu", "sm_80", **{fault: 1}), "race on global memory") >= 6


def test_missing_block_barrier(edited_ptx):
    """Threads other than the one that waits for the grid run ahead."""
    edit = delete(r"bar\.sync\s+0;", 2)
    assert caught(edited_ptx("cooperative.cu", edit, "sm_80"), "race on global memory") >= 6


@pytest.mark.parametrize("spin", SPINS, ids=str)
def test_deadlock(spin):
    """A block that never comes is an error at once where the others sleep or look with ld.acquire or volatile."""
    sim = compiled("cooperative.cu", "sm_80", **spin)
    for seed in range(3):
        with pytest.raises(ptxsim.KernelError, match="deadlock: every thread waits or spins"):
            counter = np.zeros(1, np.uint32)
            sim.launch("one_block_leaves", BLOCKS, 64, [counter], seed=seed, cooperative=True, timeout=20)


def test_schedules_differ():
    orders = set()
    for seed in range(8):
        counter, out = np.zeros(2, np.uint32), np.zeros((BLOCKS, 4), np.uint32)
        sim = compiled("cooperative.cu", "sm_80")
        sim.launch("order_of_blocks", BLOCKS, 32, [counter, out], seed=seed, cooperative=True)
        assert (np.sort(out.T.reshape(-1)) == np.arange(4 * BLOCKS)).all()
        orders.add(out.tobytes())
    assert len(orders) >= 7


def test_not_cooperative():
    """Blocks of an ordinary launch run one after another."""
    with pytest.raises(ptxsim.KernelError, match="time limit"):
        counter = np.zeros(1, np.uint32)
        compiled("cooperative.cu", "sm_80").launch("one_block_leaves", 3, 32, [counter], timeout=0.5)


def test_unsupported_combinations():
    x, out = np.zeros(64, np.int32), np.zeros(64, np.int32)
    sim = compiled("cluster.cu", "sm_90")
    with pytest.raises(ValueError, match="cooperative launch with clusters"):
        sim.launch("cluster_ring", 2, 32, [x, out], cluster=(2,), cooperative=True)
    with pytest.raises(ptxsim.KernelError, match="not supported"):
        sim.launch("cluster_ring", 2, 32, [x, out], cooperative=True)
