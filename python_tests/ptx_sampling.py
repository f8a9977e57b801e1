"""Launches the CUDA kernel of `sample_tokens` on numpy arrays through ptxsim, the way its launcher does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ptxsim
from ptx_kernels import compiled, flat_storage, type_name
from ptxsim.module import MAX_SHARED

TILE_CHUNKS = 128


@dataclass
class SamplingCase:
    """Inputs of the operator as numpy arrays, and how to launch it. Parameters are numbers or arrays [rows]."""

    logits: np.ndarray
    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    seed: Any = 0
    position: Any = 0
    bits: np.ndarray | None = None
    previous_tokens: np.ndarray | None = None
    banned: np.ndarray | None = None
    staged_chunks: int | None = None  # None: the whole row

    @property
    def chunk_entries(self) -> int:
        return 16 // self.logits.itemsize

    @property
    def bitmap_bytes(self) -> int:
        listed = self.previous_tokens is not None or self.banned is not None
        return -(-self.logits.shape[1] // 128) * 32 if listed else 0

    def chunks(self) -> int:
        return (self.logits.shape[1] + 2 * self.chunk_entries - 2) // self.chunk_entries

    def staging(self) -> int:
        return self.chunks() if self.staged_chunks is None else self.staged_chunks


@dataclass
class SamplingResult:
    tokens: np.ndarray
    logprobs: np.ndarray
    filtered_logprobs: np.ndarray
    valid: np.ndarray
    counters: ptxsim.Counters = field(repr=False)


def _per_row(value: Any, kind: type) -> list[Any]:
    """The fields of PerRow<T>."""
    return [np.asarray(value, kind), kind(0)] if isinstance(value, np.ndarray) else [None, kind(value)]


def sampling_module(arch: str) -> ptxsim.Simulator:
    return compiled("sample_tokens.cu", arch)


def launch_sampling(
    case: SamplingCase, arch: str = "sm_90", threads: int = 64, module: ptxsim.Simulator | None = None, **options: Any
) -> SamplingResult:
    """Runs the kernel; `options` go to Simulator.launch."""
    rows, vocab = case.logits.shape
    logits = flat_storage(case.logits)
    outputs = [
        np.full(rows, 7, np.int64),
        *(np.full(rows, 7, np.float32) for _ in range(2)),
        np.full(rows, 7, np.uint8),
    ]
    banned = None if case.banned is None else np.ascontiguousarray(case.banned, np.uint8)
    previous = case.previous_tokens
    reals = (case.temperature, case.top_p, case.min_p, case.repetition_penalty)
    arguments = ptxsim.Struct(
        logits, np.int64(rows), np.int64(vocab), np.int64(case.logits.strides[0] // case.logits.itemsize),
        *(part for value in reals for part in _per_row(value, np.float32)),
        *(part for value in (case.top_k, case.seed, case.position) for part in _per_row(value, np.int64)),
        case.bits, previous, np.int64(0 if previous is None else previous.shape[1]),
        banned, np.int64(vocab if banned is not None and banned.ndim == 2 else 0),
        *outputs, np.int32(case.staging()),
    )  # fmt: skip
    counters = (module or sampling_module(arch)).launch(
        f"sample_tokens_kernel<distillm::generic::{type_name(case.logits)}>"
        if case.logits.itemsize == 2
        else "sample_tokens_kernel<float>",
        rows, threads, [arguments],
        shared_bytes=case.bitmap_bytes + 16 * case.staging(), readonly=[logits],
        **options,
    )  # fmt: skip
    return SamplingResult(*outputs[:3], outputs[3].astype(bool), counters)


def launch_shape(case: SamplingCase, arch: str) -> tuple[int, int]:
    """Staged chunks and threads per block as csrc/cuda/sample_tokens.cu chooses them on this architecture."""
    static = next(iter(_static_shared(arch)))
    room = (MAX_SHARED[int(arch.removeprefix("sm_"))] * 1024 - static - case.bitmap_bytes) // 16
    staged = min(case.chunks(), room)
    kilobytes = (case.bitmap_bytes + staged * 16) / 1024
    filling = 768 if kilobytes > 72 else 512 if kilobytes > 36 else 256
    return staged, min(filling, -(-case.chunks() // TILE_CHUNKS) * 32)


def _static_shared(arch: str) -> set[int]:
    module = sampling_module(arch)
    return {module.kernel_info(name)["static_shared"] for name in module.kernels}
