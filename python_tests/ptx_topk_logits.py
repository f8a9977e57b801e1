"""Launches the CUDA kernels of `topk_logits` on numpy arrays through ptxsim, the way topk_logits.cu does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import ptxsim
from ptx_kernels import compiled, flat_storage, type_name

MAX_SEGMENTS = 1024


@dataclass
class TopkCase:
    """Inputs of the operator, as numpy arrays, and how to launch it."""

    logits: np.ndarray
    k: int = 64
    temperatures: tuple[float, ...] = (1.0,)  # at most three that are not 1
    labels: np.ndarray | None = None
    position: np.ndarray | None = None
    seed: int = 0
    threads: int | None = None
    capacity: int | None = None
    workspace: bool | None = None

    def __post_init__(self) -> None:
        self.threads = self.threads or (256 if self.position is not None or self.k <= 256 else 1024)
        if self.capacity is None:
            self.capacity = candidate_capacity(self.k, self.position is not None)
        if self.workspace is None:
            self.workspace = self.k > 1024

    @property
    def slots(self) -> list[float]:
        return [1.0] + [t for t in self.temperatures if t != 1]

    @property
    def slot_count(self) -> int:
        """As instantiated."""
        return next(n for n in (1, 2, 4) if len(self.slots) <= n)

    def shared_bytes(self) -> int:
        keys = 0 if self.workspace else self.capacity
        if self.position is None:
            return 8 * keys
        per_segment = 32 * (16 // self.logits.itemsize)
        vocab = self.logits.shape[1]
        per_segment *= -(-vocab // (MAX_SEGMENTS * per_segment))
        segments = -(-vocab // per_segment)
        return 12 * keys + 8 * (segments + 1) + 4 * segments * (1 + self.slot_count)


def candidate_capacity(k: int, sample: bool) -> int:
    if not sample and k <= 1024:
        return 1024 if k <= 64 else 2048 if k <= 256 else 4096
    wanted = max(k, 2) if sample else 2 * (k + 1024)
    return 1 << (wanted - 1).bit_length()


@dataclass
class TopkResult:
    ids: np.ndarray
    logprobs: np.ndarray
    log_norm: np.ndarray
    tail_logprob: np.ndarray
    label_logprob: np.ndarray | None
    valid: np.ndarray
    counts: np.ndarray | None
    counters: Any = None


def topk_module(case: TopkCase, arch: str) -> ptxsim.Simulator:
    return compiled("topk_logits.cu", arch, TYPE=type_name(case.logits), SLOTS=str(case.slot_count))


def launch_topk(case: TopkCase, arch: str = "sm_90", **options: Any) -> TopkResult:
    """Runs the kernel; `options` go to Simulator.launch."""
    rows, vocab = case.logits.shape
    logits, count, sample = flat_storage(case.logits), len(case.temperatures), case.position is not None
    result = TopkResult(
        np.full((rows, case.k), 7, np.int32), np.full((rows, case.k), 7, np.float32),
        np.full((rows, count), 7, np.float32), np.full((rows, count), 7, np.float32),
        None if case.labels is None else np.full(rows, 7, np.float32), np.full(rows, 7, np.uint8),
        np.full((rows, case.k), 7, np.int32) if sample else None,
    )  # fmt: skip
    inverse = [np.float32(1 / t) for t in case.slots] + [np.float32(1)] * (4 - len(case.slots))
    slot_of = sum((0 if t == 1 else case.slots.index(t)) << 4 * i for i, t in enumerate(case.temperatures))
    workspace = np.zeros(rows * case.capacity * (2 if sample else 1), np.uint64) if case.workspace else None
    arguments = ptxsim.Struct(
        logits, np.int64(case.logits.strides[0] // case.logits.itemsize), np.int32(vocab), np.int32(case.k),
        case.labels, case.position, np.int64(case.seed), result.ids, result.logprobs, result.log_norm,
        result.tail_logprob, result.label_logprob, result.valid, result.counts, workspace, np.int32(case.capacity),
        np.int32(count), np.int32(0), np.int32(count), *inverse, np.uint64(slot_of),
    )  # fmt: skip
    name = "draw_logits_kernel" if sample else "topk_logits_kernel"
    result.counters = topk_module(case, arch).launch(
        name, rows, case.threads, [arguments], shared_bytes=case.shared_bytes(), readonly=[logits], **options
    )
    return result
