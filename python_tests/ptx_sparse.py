"""Launches the CUDA kernel of `sparse_divergence` on numpy arrays through ptxsim, the way its launcher does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ptxsim
import torch
from ptx_kernels import compiled, flat_storage, loss_arguments, type_name
from ptxsim.module import MAX_SHARED
from sparse_cases import edited

from distillm_ext import CompressedLogits
from distillm_ext.checks.compressed import SAMPLED_DIVERGENCES, SPARSE_DIVERGENCES
from distillm_ext.checks.options import DEFAULT_ALPHA, DEFAULT_BETA, TAILS
from distillm_ext.reference.sparse import per_token_sparse_divergence


@dataclass
class SparseCase:
    """Inputs of the operator, and how to launch it."""

    student: np.ndarray
    teacher: CompressedLogits
    divergence: str = "skew_kl"
    tail: str = "bucket"
    temperature: float = 1.0
    labels: np.ndarray | None = None
    weight: np.ndarray | None = None
    alpha: float | None = None
    alpha_rows: np.ndarray | None = None
    cap: np.ndarray | None = None
    ce_weight: float = 0.0
    detach_mixture: bool = False
    need_gradient: bool = True
    in_place: bool = False
    gradient_vocab: int | None = None  # None: the student's
    staged_chunks: int | None = None  # None: all of the row

    def hyper_parameters(self) -> tuple[float, float]:
        alpha = DEFAULT_ALPHA.get(self.divergence) or 0.0
        return alpha if self.alpha is None else self.alpha, DEFAULT_BETA.get(self.divergence) or 0.0

    @property
    def form(self) -> int:
        if self.tail == "sampled":
            return len(SPARSE_DIVERGENCES) + SAMPLED_DIVERGENCES.index(self.divergence)
        return SPARSE_DIVERGENCES.index(self.divergence)

    @property
    def chunks(self) -> int:
        entries = 16 // self.student.itemsize
        return (self.student.shape[1] + 2 * entries - 2) // entries

    def kept_bytes(self) -> tuple[int, int]:
        """Slots of the hash table and bytes of the kept entries' arrays."""
        k, slots = self.teacher.k, 2
        while slots < 2 * k:
            slots *= 2
        return slots, 4 * (slots + (self.student.shape[1] + 38) // 32 + 4 * k)


def sparse_module(arch: str, student: np.ndarray) -> ptxsim.Simulator:
    return compiled("sparse_divergence.cu", arch, STUDENT=type_name(student))


@dataclass
class SparseResult:
    loss: np.ndarray
    gradient: np.ndarray | None
    counters: ptxsim.Counters


def launch_sparse(
    case: SparseCase, arch: str = "sm_90", threads: int = 64, module: ptxsim.Simulator | None = None, **options: Any
) -> SparseResult:
    """Runs the kernel; `options` go to Simulator.launch."""
    rows, vocab = case.student.shape
    at = case.teacher.temperatures.index(case.temperature)
    teacher = case.teacher
    gradient_vocab = case.gradient_vocab or vocab
    loss, student = np.full(rows, 7, np.float32), flat_storage(case.student)
    gradient, target = None, None
    if case.in_place:
        gradient, target = case.student, student
    elif case.need_gradient:
        gradient = np.full((rows, gradient_vocab), 7, case.student.dtype)
        target = gradient.reshape(-1)
    stride = case.student.strides[0] // case.student.itemsize
    uniform = np.int64(2**63 - 1)
    gradient_stride = stride if case.in_place else gradient_vocab
    alpha, beta = case.hyper_parameters()
    slots, kept_bytes = case.kept_bytes()
    staged = case.chunks if case.staged_chunks is None else case.staged_chunks
    counts = teacher.counts if case.tail == "sampled" else None
    fields = (teacher.ids, teacher.logprobs, teacher.log_norm[:, at], teacher.tail_logprob[:, at], counts)
    sides = [None if x is None else np.ascontiguousarray(x.numpy()) for x in fields]
    arguments = ptxsim.Struct(
        student, target, uniform, np.int64(0), np.int64(stride), uniform, np.int64(0), np.int64(gradient_stride),
        np.int32(vocab), np.int32(gradient_vocab), np.int32(teacher.vocab_size), np.int32(teacher.k), np.int32(slots),
        np.int32(staged), np.int32(case.form), np.int32(TAILS.index(case.tail)), *sides,
        *loss_arguments(case, loss, alpha, beta),
    )  # fmt: skip
    module = module or sparse_module(arch, case.student)
    read_only = [x for x in sides if x is not None] + ([] if case.in_place else [student])
    counters = module.launch(
        "sparse_divergence_kernel", rows, threads, [arguments],
        shared_bytes=staged * 16 + kept_bytes, readonly=read_only, **options,
    )  # fmt: skip
    return SparseResult(loss, gradient, counters)


def launch_shape(case: SparseCase, arch: str) -> tuple[int, int]:
    """Staged chunks and threads per block as sparse_divergence_plan.h chooses them on a device of this architecture."""
    static = sparse_module(arch, case.student).kernel_info("sparse_divergence_kernel")["static_shared"]
    room = MAX_SHARED[int(arch.removeprefix("sm_"))] * 1024 - static
    kept_bytes = case.kept_bytes()[1]
    staged = max(0, min(case.chunks, (room - kept_bytes) // 16))
    filling = 512 if staged * 16 + kept_bytes > 36 * 1024 else 256
    return staged, max(32, min(filling, -(-case.chunks // 32) * 32))


def sparse_reference(case: SparseCase) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients in float64, row by row, whatever the inputs."""
    rows, vocab = case.student.shape
    losses, gradients = np.zeros(rows), np.zeros((rows, vocab))
    for row in range(rows):
        losses[row], gradients[row] = _row_reference(case, row)
    return losses, gradients


def _row_reference(case: SparseCase, row: int) -> tuple[float, np.ndarray]:
    vocab = case.student.shape[1]
    weight = 1.0 if case.weight is None else float(case.weight[row])
    cap = np.inf if case.cap is None else float(case.cap[row])
    label = None if case.labels is None else int(case.labels[row])
    if weight == 0 or label == -100:
        return 0.0, np.zeros(vocab)
    alpha, beta = case.hyper_parameters()
    alpha = alpha if case.alpha_rows is None else float(case.alpha_rows[row])
    z = torch.tensor(case.student[row].astype(np.float64)).requires_grad_()
    teacher = edited(case.teacher[row], logprobs=case.teacher.logprobs[row].double())
    value = per_token_sparse_divergence(
        z, teacher, divergence=case.divergence, tail=case.tail, alpha=alpha, beta=beta, temperature=case.temperature,
        detach_mixture=case.detach_mixture,
    )  # fmt: skip
    legal = "skew" not in case.divergence or 0 <= alpha <= 1
    if value.isnan() or not legal or (case.ce_weight and not 0 <= label < vocab) or np.isnan(weight) or not cap >= 0:
        return np.nan, np.full(vocab, np.nan)
    total = torch.tensor(cap, dtype=torch.float64) if value > cap or value == np.inf else value
    loss = min(float(value.detach()), cap)
    if case.ce_weight:
        ce = torch.nn.functional.cross_entropy(z.unsqueeze(0), torch.tensor([label]))
        loss += case.ce_weight * float(ce.detach())
        total = total + case.ce_weight * ce if ce < np.inf else total  # an infinite one has no gradient
    gradient = torch.autograd.grad(total * weight, z)[0].numpy() if total.requires_grad else np.zeros(vocab)
    return weight * loss, gradient


def changed(case: SparseCase, **fields: Any) -> SparseCase:
    return replace(case, **fields)
