"""Every kind of mistake must be reported, and the process must survive it."""

import re

import numpy as np
import ptxsim
import pytest
from ptxsim.tests.support import compiled, softmax_reference


def delete(pattern, occurrence=0):
    """Edit that removes the n-th match of a pattern from the PTX."""

    def edit(text):
        match = list(re.finditer(pattern, text))[occurrence]
        return text[: match.start()] + text[match.end() :]

    return edit


def softmax_entry(text):
    """Only the f32 softmax, so that occurrences can be counted."""
    start = text.index(".visible .entry _Z12softmax_rowsIf")
    end = text.index("\n}\n", start)
    return start, end


def delete_in_softmax(pattern, occurrence):
    def edit(text):
        start, end = softmax_entry(text)
        return text[:start] + delete(pattern, occurrence)(text[start:end]) + text[end:]

    return edit


def launch_softmax(sim, rng, x=None, out=None, **options):
    if x is None:
        x = (rng.standard_normal((2, 1024)) * 3).astype(np.float32)
    if out is None:
        out = np.zeros_like(x)
    rows = options.pop("rows", 2)
    sim.launch("softmax_rows<float>", rows, 128, [x, out, np.int32(1024)], **options)
    return x, out


@pytest.mark.parametrize("occurrence", (0, 1))
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_missing_barrier_is_a_race(edited_ptx, rng, occurrence, seed):
    sim = edited_ptx("basic.cu", delete_in_softmax(r"bar\.sync\s+0;", occurrence))
    with pytest.raises(ptxsim.KernelError, match="race on shared memory"):
        launch_softmax(sim, rng, seed=seed)


@pytest.mark.parametrize("occurrence", (0, 1))
def test_missing_barrier_gives_wrong_values(edited_ptx, rng, occurrence):
    sim = edited_ptx("basic.cu", delete_in_softmax(r"bar\.sync\s+0;", occurrence))
    x, out = launch_softmax(sim, rng, check_races=False)
    assert not np.allclose(out, softmax_reference(x), rtol=1e-3)


def test_missing_wait_group(edited_ptx, rng):
    sim = edited_ptx("basic.cu", delete(r"cp\.async\.wait_group\s+0;"))
    x, out = rng.standard_normal(4096).astype(np.float32), np.zeros(1, np.float32)
    with pytest.raises(ptxsim.KernelError, match="cp.async is under way"):
        sim.launch("cpasync_sum", 1, 128, [x, out, 4096], shared_bytes=4096 * 4)
    sim.launch("cpasync_sum", 1, 128, [x, out, 4096], shared_bytes=4096 * 4, check_races=False)
    assert np.isnan(out[0]), "the copy never landed: the sum contains the poison"


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_missing_barrier_after_wait_group(edited_ptx, rng, seed):
    sim = edited_ptx("basic.cu", delete(r"bar\.sync\s+0;"))
    x, out = rng.standard_normal(4096).astype(np.float32), np.zeros(1, np.float32)
    with pytest.raises(ptxsim.KernelError, match="race|under way"):
        sim.launch("cpasync_sum", 1, 128, [x, out, 4096], shared_bytes=4096 * 4, seed=seed)


def test_misaligned_vector_load(rng):
    x = rng.standard_normal(2049).astype(np.float32)[1:]
    with pytest.raises(ptxsim.KernelError, match="misaligned load") as e:
        launch_softmax(compiled("basic.cu"), rng, x=x, out=np.zeros(2048, np.float32))
    assert "ld.global" in e.value.ptx_text and e.value.ptx_line > 0
    assert re.search(r"kernels\.cuh:\d+", e.value.source)
    assert e.value.block == (0, 0, 0)


def test_store_out_of_bounds(rng):
    out = np.full(2000, -1, np.float32)
    with pytest.raises(ptxsim.KernelError, match=r"out-of-bounds store .* of buffer arg1") as e:
        launch_softmax(compiled("basic.cu"), rng, out=out)
    assert e.value.block == (1, 0, 0)
    assert (out == -1).all(), "a failed launch leaves the arrays alone"


def test_load_out_of_bounds(rng):
    x = rng.standard_normal(1024).astype(np.float32)
    with pytest.raises(ptxsim.KernelError, match=r"out-of-bounds load .* of buffer arg0"):
        launch_softmax(compiled("basic.cu"), rng, x=x, out=np.zeros(2048, np.float32))


def test_write_to_readonly(rng):
    out = np.zeros(2048, np.float32)
    with pytest.raises(ptxsim.KernelError, match="read-only buffer"):
        launch_softmax(compiled("basic.cu"), rng, out=out, readonly=[out])
    out.flags.writeable = False
    with pytest.raises(ptxsim.KernelError, match="read-only buffer"):
        launch_softmax(compiled("basic.cu"), rng, out=out)


def faulty(kernel, threads=64, args=None, **options):
    out = np.zeros(threads, np.float32)
    compiled("faulty.cu").launch(kernel, 1, threads, [out] if args is None else args, **options)
    return out


@pytest.mark.parametrize("seed", (0, 1))
def test_divergent_barrier(seed):
    with pytest.raises(ptxsim.KernelError, match="deadlock|barrier after") as e:
        faulty("divergent_barrier", 96, seed=seed)
    assert "bar.sync" in str(e.value)


@pytest.mark.parametrize("seed", (0, 1))
def test_barrier_after_exit(seed):
    out = np.zeros(64, np.int32)
    with pytest.raises(ptxsim.KernelError, match="deadlock|exited"):
        faulty("barrier_after_exit", 64, [out, 33], seed=seed)


@pytest.mark.parametrize("seed", (0, 1, 2, 3))
def test_bad_shuffle_masks(seed):
    with pytest.raises(ptxsim.KernelError, match="exits while lanes|have exited"):
        faulty("bad_mask", 32, seed=seed)
    with pytest.raises(ptxsim.KernelError, match="exits while lanes|have exited"):
        faulty("exited_lane", 32, seed=seed)
    with pytest.raises(ptxsim.KernelError, match="calling lane is not in mask"):
        faulty("lane_not_in_mask", 32, seed=seed)
    with pytest.raises(ptxsim.KernelError, match="reads lane 15, which .* does not exist"):
        faulty("bad_mask", 15, seed=seed)


@pytest.mark.parametrize("seed", (0, 1))
def test_mask_may_name_lanes_that_do_not_exist(seed):
    out = np.zeros(16, np.int32)
    faulty("bad_mask", 16, [out], seed=seed)
    assert out.tolist() == [i ^ 1 for i in range(16)]


def test_uninitialised_shared_memory_is_nan():
    out = faulty("uninitialised_shared")
    assert (out[:63] == 1).all() and np.isnan(out[63])


def test_shared_overrun():
    out = np.zeros(64, np.float32)
    with pytest.raises(ptxsim.KernelError, match="out-of-bounds shared"):
        faulty("shared_overrun", 64, [out, 1])


@pytest.mark.parametrize("seed", (0, 1))
def test_races_within_a_warp(seed):
    with pytest.raises(ptxsim.KernelError, match="race on shared memory"):
        faulty("missing_syncwarp", 32, seed=seed)
    with pytest.raises(ptxsim.KernelError, match="race on shared memory"):
        faulty("write_write", 64, seed=seed)
    assert faulty("with_syncwarp", 32, seed=seed).tolist() == [i ^ 1 for i in range(32)]
    assert (faulty("same_value", 64, seed=seed) == 7).all()


def test_endless_loop_hits_the_time_limit():
    with pytest.raises(ptxsim.KernelError, match="time limit"):
        faulty("endless", 32, timeout=0.2)


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_spinning_thread_does_not_starve_the_others(seed):
    out = np.zeros(64, np.int32)
    faulty("spin_on_shared", 64, [out], seed=seed)
    assert out[0] == 42


def test_null_pointer():
    with pytest.raises(ptxsim.KernelError, match="null pointer"):
        faulty("null_pointer", 32, [None])


def test_wrong_arguments():
    sim = compiled("counting.cu")
    a = np.zeros(32, np.float32)
    with pytest.raises(TypeError, match="4 arguments"):
        sim.launch("vector_add", 1, 32, [a, a, a])
    with pytest.raises(TypeError, match="4 bytes, the parameter 8"):
        sim.launch("vector_add", 1, 32, [a, a, np.int32(0), 32])
    with pytest.raises(TypeError, match="float"):
        sim.launch("vector_add", 1, 32, [a, a, a, np.float32(32)])
    with pytest.raises(TypeError, match="contiguous"):
        sim.launch("vector_add", 1, 16, [np.zeros(64, np.float32)[::2], a, a, 16])
    with pytest.raises(ValueError, match="threads"):
        sim.launch("vector_add", 1, 1025, [a, a, a, 32])
    with pytest.raises(ValueError, match="shared memory"):
        sim.launch("vector_add", 1, 32, [a, a, a, 32], shared_bytes=228 * 1024)
    with pytest.raises(KeyError, match="names 2 kernels"):
        sim.launch("columns", 1, 32, [a])


@pytest.mark.parametrize(
    "instruction",
    [
        "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1, %d2}, {%d3}, {%d4}, {%d5, %d6};",
        "add.rn.unknown.f32 %f1, %f1, %f1;",
        "min.xorsign.abs.f32 %f1, %f1, %f1;",
        "ld.global.f32 %f1, [missing_symbol];",
        "tex.1d.v4.f32.s32 {%f1, %f1, %f1, %f1}, [t, {%r1}];",
    ],
)
def test_unknown_instruction_is_an_error(edited_ptx, instruction):
    def edit(text):
        return text.replace("\tret;", f"\t{instruction}\n\tret;", 1)

    with pytest.raises(ptxsim.TranslationError, match=r"edited\.ptx:\d+ \(.*counting\.cu:\d+\)"):
        edited_ptx("counting.cu", edit)
