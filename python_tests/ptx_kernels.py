"""Launches the CUDA kernels on numpy arrays through ptxsim, the way their launchers in csrc/cuda do."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import ptxsim

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path(__file__).resolve().parent / "kernels"
TYPE_NAMES = {np.dtype(np.float32): "float", np.dtype(ml_dtypes.bfloat16): "BFloat16", np.dtype(np.float16): "Half"}
TYPE_NUMBERS = {name: number for number, name in enumerate(TYPE_NAMES.values())}  # enum ElementType
FUNCTORS = {
    "forward_kl": "ForwardKl",
    "reverse_kl": "ReverseKl",
    "skew_kl": "SkewKlFromZero",
    "skew_reverse_kl": "SkewReverseKlFromZero",
    "symmetric_kl": "SymmetricKl",
    "generalized_js": "GeneralizedJs",
    "total_variation": "TotalVariation",
    "alpha_beta": "AlphaBeta",
    "token_adaptive": "TokenAdaptive",
    "adaptive_kl": "AdaptiveKl",
    "interpolated": "Interpolated",
}
# Shared memory in KB: most of a block and all of a multiprocessor's; 1 of the latter is reserved per block.
SHARED_KILOBYTES = {80: (163, 164), 86: (99, 100), 89: (99, 100), 90: (227, 228), 100: (227, 228), 120: (99, 100)}
# Published defaults of alpha and beta, where they are not (0.1, unused); interpolated has none.
HYPER_PARAMETERS = {
    "symmetric_kl": (0.1, 0.9),
    "generalized_js": (0.1, 0.5),
    "alpha_beta": (0.2, 0.7),
    "adaptive_kl": (0.5, 0.0),
    "interpolated": (0.4, 0.0),
}


def type_name(array: np.ndarray) -> str:
    return TYPE_NAMES[array.dtype]


@cache
def compiled(source: str, arch: str, **defines: str) -> ptxsim.Simulator:
    """A file of python_tests/kernels, optimised as in the extension. One simulator per process and set of defines."""
    return ptxsim.compile_cuda(KERNELS / source, arch, include_dirs=[ROOT / "csrc"], defines=defines, options=["-O3"])


def divergence_module(arch: str, divergence: str, student: np.ndarray, teacher: np.ndarray) -> ptxsim.Simulator:
    """The divergence kernel for this pair of dtypes; unequal ones are known to it at run time only."""
    row_type = type_name(student) if student.dtype == teacher.dtype else "AnyElement"
    return compiled("divergence.cu", arch, FUNCTOR=FUNCTORS[divergence], TYPE=row_type)


@dataclass
class DivergenceCase:
    """Inputs of the operator `divergence`, as numpy arrays, and how to launch it."""

    student: np.ndarray
    teacher: np.ndarray
    divergence: str = "skew_kl"
    labels: np.ndarray | None = None
    weight: np.ndarray | None = None
    alpha_rows: np.ndarray | None = None
    cap: np.ndarray | None = None
    alpha: float | None = None  # None: the published default, as for beta
    beta: float | None = None
    temperature: float = 1.0
    ce_weight: float = 0.0
    ignore_index: int = -100
    detach_mixture: bool = False
    need_gradient: bool = True
    need_metrics: bool = False
    in_place: bool = False
    student_blocks: np.ndarray | None = None  # [B, S, V]: where the rows of `student` lie, with two strides
    staged_turns: int | None = None  # of each thread; None: all of them
    kept_turns: int | None = None  # of those; None: all of them
    vocab_size: int | None = None  # entries of both sides to use; None: all

    def __post_init__(self) -> None:
        alpha, beta = HYPER_PARAMETERS.get(self.divergence, (0.1, 0.0))
        self.alpha = alpha if self.alpha is None else self.alpha
        self.beta = beta if self.beta is None else self.beta

    @property
    def chunk_entries(self) -> int:
        return 16 // self.student.itemsize if self.student.dtype == self.teacher.dtype else 4

    slot_bytes = 32  # shared memory per thread and staged turn

    @property
    def kept_bytes(self) -> int:
        """More of it in a kept turn."""
        return 4 * self.chunk_entries - 16

    @property
    def chunks(self) -> int:
        """The most that a row is cut into."""
        vocab = max(self.student.shape[1], self.teacher.shape[1])
        return (vocab + 2 * self.chunk_entries - 2) // self.chunk_entries

    def turns(self, cluster: int, threads: int) -> tuple[int, int]:
        """Staged and kept turns of each thread."""
        most = -(-self.chunks // (cluster * threads))
        staged = most if self.staged_turns is None else min(self.staged_turns, most)
        kept = staged if self.kept_turns is None else min(self.kept_turns, staged)
        return staged, kept if self.need_gradient else 0


@dataclass
class DivergenceResult:
    loss: np.ndarray
    gradient: np.ndarray | None
    metrics: np.ndarray | None
    counters: ptxsim.Counters


def flat_storage(array: np.ndarray) -> np.ndarray:
    """The memory from a view's first to its last entry, as a flat view of the array that the view was made from: ptxsim
    then gives it the same alignment."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    first = (array.ctypes.data - root.ctypes.data) // array.itemsize
    last = sum((size - 1) * stride // array.itemsize for size, stride in zip(array.shape, array.strides, strict=True))
    return root.reshape(-1)[first : first + last + 1]


def row_layout(array: np.ndarray) -> list[np.int64]:
    """The fields of RowLayout for [R, V] or [B, S, V]."""
    strides = [stride // array.itemsize for stride in array.strides]
    per_block = np.iinfo(np.int64).max if array.ndim == 2 else array.shape[1]
    return [np.int64(per_block), np.int64(0 if array.ndim == 2 else strides[0]), np.int64(strides[-2])]


def loss_arguments(
    case: Any, loss: np.ndarray, alpha: float | None, beta: float | None, ignore_index: int = -100
) -> list[Any]:
    """The fields of LossArguments for a case with labels, weight, alpha_rows, cap, temperature and so on."""
    return [
        np.float32(alpha), np.float32(beta), np.float32(1 / case.temperature), np.float32(case.ce_weight),
        np.bool_(case.detach_mixture), case.labels, case.weight, case.alpha_rows, case.cap,
        loss, np.int64(ignore_index),
    ]  # fmt: skip


def architecture(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def launch_divergence(
    case: DivergenceCase,
    arch: str = "sm_90",
    threads: int = 64,
    cluster: int = 1,
    module: ptxsim.Simulator | None = None,
    **options: Any,
) -> DivergenceResult:
    """Runs the kernel; `options` go to Simulator.launch."""
    rows, columns = case.student.shape
    module = module or divergence_module(arch, case.divergence, case.student, case.teacher)
    vocab = columns if case.vocab_size is None else case.vocab_size
    teacher_vocab = case.teacher.shape[1] if case.vocab_size is None else case.vocab_size
    staged, kept = case.turns(cluster, threads)
    placed = case.student if case.student_blocks is None else case.student_blocks
    student, teacher = flat_storage(placed), flat_storage(case.teacher)
    loss = np.full(rows, 7, np.float32)
    gradient = None
    if case.need_gradient:
        gradient = placed if case.in_place else np.full((rows, columns), 7, case.student.dtype)
    metrics = np.full((rows, 3), 7, np.float32) if case.need_metrics else None
    target = flat_storage(gradient) if case.need_gradient else None
    if case.in_place:
        target = student
    arguments = ptxsim.Struct(
        student, teacher, target,
        *row_layout(placed), *row_layout(case.teacher), *row_layout(placed if gradient is None else gradient),
        np.int32(vocab), np.int32(teacher_vocab), np.int32(columns),
        *(np.int32(TYPE_NUMBERS[type_name(side)]) for side in (case.student, case.teacher)),
        np.int32(staged), np.int32(kept), metrics,
        *loss_arguments(case, loss, case.alpha, case.beta, case.ignore_index),
    )  # fmt: skip
    counters = module.launch(
        "divergence_kernel", rows * cluster, threads, [arguments], cluster=(cluster, 1, 1),
        shared_bytes=threads * (staged * case.slot_bytes + kept * case.kept_bytes),
        readonly=[teacher] if case.in_place else [student, teacher],
        **options,
    )  # fmt: skip
    return DivergenceResult(loss, gradient, metrics, counters)


@dataclass(frozen=True)
class Plan:
    """struct DivergencePlan of csrc/cuda/divergence/divergence_plan.h."""

    cluster: int
    threads: int
    staged_turns: int
    kept_turns: int


@cache
def planner() -> Any:
    """The launch plans of csrc/cuda, as functions of C."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/plan.so"
        command = [os.environ.get("CXX", "g++"), "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(KERNELS / "plan.cpp"), "-o", library], check=True)
        return ctypes.CDLL(library)


def most_blocks_of_cluster(arch: str, clusters: bool) -> int:
    """Of a device of this architecture; `clusters`: whether it can hold any."""
    return 8 if clusters and architecture(arch) >= 90 else 1


def plan_launch(case: DivergenceCase, arch: str, clusters: bool = True) -> Plan:
    """What csrc/cuda/divergence/divergence.cu chooses on a device of this architecture."""
    module = divergence_module(arch, case.divergence, case.student, case.teacher)
    block, multiprocessor = (1024 * kilobytes for kilobytes in SHARED_KILOBYTES[architecture(arch)])
    static = module.kernel_info("divergence_kernel")["static_shared"]
    shape = (ctypes.c_int64 * 5)(case.chunks, case.slot_bytes, case.kept_bytes, case.need_gradient, static)
    device = (ctypes.c_int64 * 4)(block, multiprocessor, 1024, most_blocks_of_cluster(arch, clusters))
    out = (ctypes.c_int64 * 4)()
    planner().plan(shape, device, out)
    return Plan(*out)


MOST_THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}  # of a multiprocessor
MOST_REGISTERS = 65536 // 384  # of a thread of the kernel, by its launch bounds


def occupancy(case: DivergenceCase, plan: Plan, arch: str) -> float:
    """Share of a multiprocessor's threads that are resident, as shared memory and registers let blocks in."""
    number = architecture(arch)
    static = divergence_module(arch, case.divergence, case.student, case.teacher).kernel_info("divergence_kernel")
    bytes_of_block = (
        1024
        + static["static_shared"]
        + plan.threads * (plan.staged_turns * case.slot_bytes + plan.kept_turns * case.kept_bytes)
    )
    by_shared = 1024 * SHARED_KILOBYTES[number][1] // bytes_of_block
    by_registers = 65536 // (MOST_REGISTERS // 8 * 8 * plan.threads)
    return min(by_shared, by_registers) * plan.threads / MOST_THREADS[number]


def launch_planned(case: DivergenceCase, arch: str, clusters: bool = True, **options: Any) -> DivergenceResult:
    """Runs the kernel as the extension would launch it."""
    plan = plan_launch(case, arch, clusters)
    case = replace(case, staged_turns=plan.staged_turns, kept_turns=plan.kept_turns)
    return launch_divergence(case, arch, plan.threads, plan.cluster, **options)
