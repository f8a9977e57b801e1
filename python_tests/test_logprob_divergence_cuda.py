"""The CUDA kernel of `logprob_divergence`, executed from its PTX by ptxsim, and what ptxas says about it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import ptxsim
import pytest
import torch
from logprob_cases import FORMS, assert_close, logprobs
from ptx_kernels import FUNCTORS, TYPE_NUMBERS, compiled, flat_storage, row_layout, type_name
from tiers import full

FLOAT, BFLOAT16, HALF = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
PAIRS = [(FLOAT, FLOAT), (BFLOAT16, BFLOAT16), (HALF, HALF), (BFLOAT16, FLOAT), (FLOAT, HALF)]
SOURCE = "logprob_divergence.cu"


def kernel_name(student, teacher, form):
    divergence, _, floor = form
    functor = f"distillm::generic::{FUNCTORS[divergence]}<float>"
    terms = f"distillm::generic::LogprobTerms<float, {functor}, {'false' if floor is None else 'true'}>"
    name = type_name(student) if student.dtype == teacher.dtype else "AnyElement"
    prefix = {"float": "", "AnyElement": "distillm::"}.get(name, "distillm::generic::")
    return f"logprob_divergence_kernel<{terms}, {prefix}{name}>"


def launch(student, teacher, weight, form, arch="sm_90", threads=64, seed=0, need_gradient=True):
    """As csrc/cuda/logprob_divergence/logprob_divergence.cu does. Returns losses, gradient and counters."""
    _, beta, floor = form
    rows, vocab = student.shape
    loss = np.full(rows, 7, np.float32)
    gradient = np.full((rows, vocab), 7, student.dtype) if need_gradient else None
    sides = [flat_storage(student), flat_storage(teacher)]
    arguments = ptxsim.Struct(
        *sides, gradient, *row_layout(student), *row_layout(teacher), weight, loss,
        *(np.int32(TYPE_NUMBERS[type_name(side)]) for side in (student, teacher)),
        np.int32(vocab), np.float32(beta), np.float32(floor or 0),
    )  # fmt: skip
    kernel = kernel_name(student, teacher, form)
    counters = compiled(SOURCE, arch).launch(kernel, rows, threads, [arguments], seed=seed, readonly=sides)
    return loss, gradient, counters


def as_tensor(array: np.ndarray) -> torch.Tensor:
    wide = torch.from_numpy(array.astype(np.float32))
    return wide.to({FLOAT: torch.float32, BFLOAT16: torch.bfloat16, HALF: torch.float16}[array.dtype])


def pair(rows, vocab, types, form, offset=0):
    """Rows whose first entries lie `offset` entries beyond where the memory begins."""

    def placed(values, dtype):
        storage = np.empty(offset + rows * vocab, dtype)
        view = storage[offset:].reshape(rows, vocab)
        view[:] = values.numpy().astype(dtype)
        return view

    teacher = logprobs(rows, vocab, seed=2)
    student = placed(logprobs(rows, vocab, seed=1), types[0])
    return student, placed(teacher if form[2] is None else teacher.exp(), types[1])


@pytest.mark.parametrize("arch", ("sm_90", *full("sm_80")))
@pytest.mark.parametrize("types", PAIRS, ids=lambda pair: "-".join(map(str, pair)))
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(arch, types, form):
    for seed, (vocab, offset) in enumerate(((1, 0), (7, 1), (31, 3), (600, 0), (1023, 5))):
        student, teacher = pair(2, vocab, types, form, offset)
        weight = np.array([0.5, -1.5], np.float32)
        loss, gradient, _ = launch(student, teacher, weight, form, arch, seed=seed)
        x, y = as_tensor(student), as_tensor(teacher)
        assert_close(torch.from_numpy(loss), as_tensor(gradient), x, y, torch.from_numpy(weight), form)
        again, none, _ = launch(student, teacher, weight, form, arch, seed=seed, need_gradient=False)
        assert none is None
        np.testing.assert_allclose(again, loss, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_left_out_and_entries_without_a_number(form):
    student, teacher = pair(4, 77, (FLOAT, FLOAT), form)
    student[:, 70:], teacher[:, 70:] = -np.inf, -np.inf if form[2] is None else 0
    student[0], teacher[0] = np.nan, np.nan
    student[1, 3], teacher[2, 4] = np.nan, np.nan
    loss, gradient, counters = launch(student, teacher, np.array([0, 1, 1, 1], np.float32), form)
    assert np.isnan(loss).tolist() == [False, True, True, False] and loss[0] == 0
    assert np.argwhere(np.isnan(gradient)).tolist() == [[1, 3], [2, 4]]
    assert (gradient[0] == 0).all() and (gradient[:, 70:] == 0).all()
    assert max(counters.buffers[0].load_bytes, counters.buffers[1].load_bytes) < 4 * 4 * 77  # row 0 is not read


def test_traffic():
    """Both sides read once and the gradient written once, by full-width accesses."""
    form = FORMS[4]
    student, teacher = pair(2, 4096, (BFLOAT16, BFLOAT16), form)
    _, _, counters = launch(student, teacher, None, form, threads=256)
    read, other, written = counters.buffers[:3]
    assert read.load_bytes == other.load_bytes == written.store_bytes == 2 * 2 * 4096
    assert counters.store_efficiency > 0.99
