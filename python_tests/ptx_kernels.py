"""Launches the CUDA kernels on numpy arrays through ptxsim, the way their launchers in csrc/cuda do."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import ptxsim
from ptxsim.module import MAX_SHARED

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
}
# Published defaults of alpha and beta, where they are not (0.1, unused).
HYPER_PARAMETERS = {"symmetric_kl": (0.1, 0.9), "generalized_js": (0.1, 0.5), "alpha_beta": (0.2, 0.7)}


def type_name(array: np.ndarray) -> str:
    return TYPE_NAMES[array.dtype]


@cache
def compiled(source: str, arch: str, **defines: str) -> ptxsim.Simulator:
    """A file of python_tests/kernels, optimised as in the extension. One simulator per process and set of defines."""
    return ptxsim.compile_cuda(KERNELS / source, arch, include_dirs=[ROOT / "csrc"], defines=defines, options=["-O3"])


def divergence_module(arch: str, divergence: str, student: np.ndarray, teacher: np.ndarray) -> ptxsim.Simulator:
    """The divergence kernel for this pair of dtypes; unequal ones take the run-time typed teacher."""
    same = student.dtype == teacher.dtype
    return compiled(
        "divergence.cu",
        arch,
        FUNCTOR=FUNCTORS[divergence],
        STUDENT=type_name(student),
        TEACHER=type_name(teacher) if same else "AnyElement",
    )


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
    in_place: bool = False
    staged_chunks: int | None = None  # per row; None: all of them

    def __post_init__(self) -> None:
        alpha, beta = HYPER_PARAMETERS.get(self.divergence, (0.1, 0.0))
        self.alpha = alpha if self.alpha is None else self.alpha
        self.beta = beta if self.beta is None else self.beta

    @property
    def chunk_entries(self) -> int:
        return 16 // self.student.itemsize if self.student.dtype == self.teacher.dtype else 4

    @property
    def slot_bytes(self) -> int:
        teacher_bytes = self.teacher.itemsize if self.student.dtype == self.teacher.dtype else 4
        return self.chunk_entries * (self.student.itemsize + teacher_bytes)

    def staging(self) -> int:
        """Chunks of a row kept in shared memory."""
        if self.staged_chunks is not None:
            return self.staged_chunks
        vocab = max(self.student.shape[1], self.teacher.shape[1])
        return (vocab + 2 * self.chunk_entries - 2) // self.chunk_entries


@dataclass
class DivergenceResult:
    loss: np.ndarray
    gradient: np.ndarray | None
    counters: ptxsim.Counters


def _storage(array: np.ndarray) -> np.ndarray:
    """The memory from a view's first to its last entry, as a flat view of the array that the view was made from: ptxsim
    then gives it the same alignment."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    first = (array.ctypes.data - root.ctypes.data) // array.itemsize
    rows, columns = array.shape
    return root.reshape(-1)[first : first + (rows - 1) * (array.strides[0] // array.itemsize) + columns]


def launch_divergence(
    case: DivergenceCase,
    arch: str = "sm_90",
    threads: int = 64,
    module: ptxsim.Simulator | None = None,
    **options: Any,
) -> DivergenceResult:
    """Runs the kernel; `options` go to Simulator.launch."""
    rows, vocab = case.student.shape
    student, teacher = _storage(case.student), _storage(case.teacher)
    loss = np.full(rows, 7, np.float32)
    gradient = None
    if case.need_gradient:
        gradient = case.student if case.in_place else np.full((rows, vocab), 7, case.student.dtype)
    target = _storage(gradient) if case.need_gradient else None
    if case.in_place:
        target = student
    arguments = ptxsim.Struct(
        student, teacher,
        np.int64(case.student.strides[0] // case.student.itemsize),
        np.int64(case.teacher.strides[0] // case.teacher.itemsize),
        np.int32(vocab), np.int32(case.teacher.shape[1]), np.int32(TYPE_NUMBERS[type_name(case.teacher)]),
        np.int32(case.staging()),
        case.labels, case.weight, case.alpha_rows, case.cap, loss, target, np.int64(case.ignore_index),
        np.float32(case.alpha), np.float32(case.beta), np.float32(1 / case.temperature), np.float32(case.ce_weight),
        np.int32(case.detach_mixture),
    )  # fmt: skip
    module = module or divergence_module(arch, case.divergence, case.student, case.teacher)
    counters = module.launch(
        "divergence_kernel", rows, threads, [arguments],
        shared_bytes=case.staging() * case.slot_bytes,
        readonly=[teacher] if case.in_place else [student, teacher],
        **options,
    )  # fmt: skip
    return DivergenceResult(loss, gradient, counters)


def launch_shape(case: DivergenceCase, arch: str) -> tuple[int, int]:
    """Staged chunks and threads per block as csrc/cuda/divergence.cu chooses them on a device of this architecture."""
    module = divergence_module(arch, case.divergence, case.student, case.teacher)
    room = MAX_SHARED[int(arch.removeprefix("sm_"))] * 1024 - module.kernel_info("divergence_kernel")["static_shared"]
    chunks = case.staging()
    staged = min(chunks, room // case.slot_bytes)
    kilobytes = staged * case.slot_bytes / 1024
    filling = 1024 if kilobytes > 72 else 512 if kilobytes > 36 else 256
    return staged, min(filling, -(-chunks // 32) * 32)


@dataclass
class KernelResources:
    """What ptxas says about a kernel."""

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int


def ptxas_report(arch: str, source: str = "all.cu") -> list[KernelResources]:
    """Compiles the kernels of a file of python_tests/kernels for a real architecture and reads `ptxas -v`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ptxsim.find_nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
                   f"-I{ROOT / 'csrc'}", str(KERNELS / source), "-o", f"{folder}/all.cubin"]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    found = re.findall(pattern, text)
    names = ptxsim.demangle([mangled for mangled, *_ in found])
    return [
        KernelResources(_short(name), int(registers), int(stores) + int(loads), int(stack), int(shared or 0))
        for name, (_, stack, stores, loads, registers, shared) in zip(names, found, strict=True)
    ]


def _short(name: str) -> str:
    return re.sub(r"distillm::(generic::)?|\(.*\)|^void ", "", name)
