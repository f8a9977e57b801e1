"""The CUDA kernel of `scale_rows_`, executed from its PTX by ptxsim."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import ptxsim
import pytest
from ptx_kernels import compiled, flat_storage, row_layout, type_name
from tiers import full

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


def scale_rows(gradient: np.ndarray, scale: np.ndarray, arch: str = "sm_90", seed: int = 0, threads: int = 64):
    rows, vocab = gradient.shape[:-1], gradient.shape[-1]
    module = compiled("scale_rows.cu", arch)
    kernel = f"scale_rows_kernel<distillm::generic::{type_name(gradient)}>" if gradient.itemsize == 2 else "<float>"
    arguments = [flat_storage(gradient), ptxsim.Struct(*row_layout(gradient)), scale, np.int32(vocab)]
    return module.launch(kernel, int(np.prod(rows)), threads, arguments, seed=seed, readonly=[scale])


@pytest.mark.parametrize("arch", ["sm_90", *full("sm_80")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_product(arch, dtype, offset):
    rng = np.random.default_rng(3)
    scale = np.array([2.5, 1, 0, -1, 1e-3], np.float32)
    for seed, vocab in enumerate((1, 2, 7, 31, 1023)):
        gradient = rng.standard_normal(offset + 5 * vocab).astype(dtype)[offset:].reshape(5, vocab)
        expected = (gradient.astype(np.float32) * scale[:, None]).astype(dtype)
        scale_rows(gradient, scale, arch, seed)
        np.testing.assert_array_equal(gradient.astype(np.float32), expected.astype(np.float32))


def test_blocks_of_rows():
    """Rows with two strides, as an in-place gradient of logits[:, :-1] has; what lies between is not touched."""
    whole = np.ones((2, 4, 1023), DTYPES[1])
    scale_rows(whole[:, :3], np.arange(6, dtype=np.float32) + 2)
    got = whole[:, :, 0].astype(np.float32)
    np.testing.assert_array_equal(got, [[2, 3, 4, 1], [5, 6, 7, 1]])
    assert (whole == whole[:, :, :1]).all()


def test_not_a_number_spreads_over_its_row_alone():
    gradient = np.ones((3, 21), np.float32)
    gradient[2, 5] = np.nan
    scale_rows(gradient, np.array([np.nan, 2, 2], np.float32))
    assert np.isnan(gradient[0]).all() and (gradient[1] == 2).all() and np.isnan(gradient[2]).sum() == 1


def test_traffic():
    """Rows with a scale of 1 are not touched, the others read and written once by full-width accesses."""
    gradient = np.ones((4, 4096), DTYPES[1])
    counters = scale_rows(gradient, np.array([1, 1, 3, 1], np.float32), threads=256)
    assert counters.buffers[0].load_bytes == counters.buffers[0].store_bytes == 2 * 4096
    assert counters.load_bytes == 2 * 4096 + 4 * 4 * 256  # every thread of a block reads the scale of its row
    assert counters.store_efficiency == 1
    assert scale_rows(gradient, np.ones(4, np.float32)).buffers[0].load_bytes == 0
