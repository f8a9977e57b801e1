"""Launches the CUDA kernel of `sample_tokens` on numpy arrays through ptxsim, the way its launcher does."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ptxsim
from ptx_kernels import (
    SHARED_KILOBYTES,
    architecture,
    compiled,
    flat_storage,
    most_blocks_of_cluster,
    planner,
    type_name,
)

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
    staged_chunks: int | None = None  # in each block; None: the whole row
    cluster: int = 1

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
        tiles = -(-self.chunks() // TILE_CHUNKS)
        return -(-tiles // self.cluster) * TILE_CHUNKS if self.staged_chunks is None else self.staged_chunks


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


def sampling_module(arch: str, logits: np.ndarray) -> ptxsim.Simulator:
    return compiled("sample_tokens.cu", arch, LOGITS=type_name(logits))


def launch_sampling(
    case: SamplingCase,
    arch: str = "sm_90",
    threads: int = 64,
    module: ptxsim.Simulator | None = None,
    **options: Any,
) -> SamplingResult:
    """Runs the kernel; `options` go to Simulator.launch."""
    rows, vocab = case.logits.shape
    module = module or sampling_module(arch, case.logits)
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
    counters = module.launch(
        "sample_tokens_kernel", rows * case.cluster, threads, [arguments], cluster=(case.cluster, 1, 1),
        shared_bytes=case.bitmap_bytes + 16 * case.staging(), readonly=[logits],
        **options,
    )  # fmt: skip
    return SamplingResult(*outputs[:3], outputs[3].astype(bool), counters)


def planned(case: SamplingCase, arch: str, clusters: bool = True) -> tuple[SamplingCase, int]:
    """The case, and threads per block, as csrc/cuda/sample_tokens/sample_tokens.cu launches it on a device of this
    architecture."""
    module = sampling_module(arch, case.logits)
    static = module.kernel_info("sample_tokens_kernel")["static_shared"]
    room = SHARED_KILOBYTES[architecture(arch)][0] * 1024 - static - case.bitmap_bytes
    most = most_blocks_of_cluster(arch, clusters)
    plan = (ctypes.c_int64 * 3)()
    planner().plan_sample_tokens((ctypes.c_int64 * 4)(case.chunks(), room // 16, case.bitmap_bytes, most), plan)
    cluster, threads, staged = plan
    return replace(case, cluster=cluster, staged_chunks=staged), threads
