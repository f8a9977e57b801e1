"""Cases of the CUDA kernel of `sample_tokens`, and its comparison with the CPU kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from ptx_sampling import SamplingCase, launch_sampling

from distillm_ext.ops.sample_tokens import sample_tokens as cpu_operator

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
RULES = [
    {}, {"temperature": 0.8}, {"temperature": 0.0}, {"top_k": 1}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"top_p": 0.9}, {"top_p": 1e-6}, {"min_p": 0.1}, {"top_k": 20, "min_p": 0.05}, {"top_p": 0.95, "min_p": 0.02},
    {"top_k": 10**6, "temperature": 2.0}, {"top_k": 700}, {"top_k": 600, "min_p": 0.01}, {"top_p": 0.999},
    {"top_k": 900, "top_p": 0.6}, {"top_k": 1500, "top_p": 0.8, "min_p": 0.01},
]  # fmt: skip
ENDS = np.array([0, -1, 2**63 - 1, -(2**63)])


def logits(rng, rows: int, vocab: int, dtype=F32, spread: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((rows, vocab)) * spread).astype(dtype)


def unaligned(array: np.ndarray, entries: int, stride: int | None = None) -> np.ndarray:
    """The same values `entries` past an aligned address, rows `stride` apart."""
    rows, columns = array.shape
    stride = stride or columns
    storage = np.full(entries + rows * stride, np.nan, array.dtype)
    view = storage[entries:].reshape(rows, stride)[:, :columns]
    view[...] = array
    return view


def tensor(array: np.ndarray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype == BF16 else torch.tensor(array)


def on_cpu(case: SamplingCase):
    def value(x, dtype):
        return torch.tensor(x, dtype=dtype) if isinstance(x, np.ndarray) else x

    real, integer = torch.float32, torch.int64
    lists = {
        "previous_tokens": None if case.previous_tokens is None else tensor(case.previous_tokens),
        "banned": None if case.banned is None else tensor(case.banned),
        "bits": None if case.bits is None else tensor(case.bits),
    }
    return cpu_operator(
        tensor(case.logits), temperature=value(case.temperature, real), top_k=value(case.top_k, integer),
        top_p=value(case.top_p, real), min_p=value(case.min_p, real), seed=value(case.seed, integer),
        position=value(case.position, integer), repetition_penalty=value(case.repetition_penalty, real), **lists,
    )  # fmt: skip


def check(case: SamplingCase, arch: str = "sm_90", **options):
    """Launches and compares with the CPU kernel: tokens and validity exactly, log-probabilities to rounding."""
    tokens, logprobs, filtered, valid = (x.numpy() for x in on_cpu(case))
    result = launch_sampling(case, arch, **options)
    np.testing.assert_array_equal(result.valid, valid)
    np.testing.assert_array_equal(result.tokens, tokens)
    np.testing.assert_allclose(result.logprobs, logprobs, rtol=2e-6, atol=3e-6)
    np.testing.assert_allclose(result.filtered_logprobs, filtered, rtol=2e-6, atol=1e-6)
    return result
