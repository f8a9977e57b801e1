"""Loads the compiled libraries: `_C` (schemas and CPU operators) and, with a CUDA build of torch, `_C_cuda`."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent


def _library(name: str) -> Path | None:
    candidates = (_PACKAGE / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _load_cpu() -> None:
    path = _library("_C")
    if path is None:
        raise ImportError(
            f"distillm_ext is not built: {_PACKAGE} holds no _C library. Run 'pip install .' in the source folder, and "
            "start Python outside of it (or install with 'pip install -e . --no-build-isolation')."
        )
    torch.ops.load_library(str(path))


def _load_cuda() -> str | None:
    """Loads the CUDA operators; returns why not, or None when they are there."""
    path = _library("_C_cuda")
    if path is None:
        return "this build has no CUDA kernels (built without nvcc or a CUDA build of torch, or with DISTILLM_CUDA=0)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


_load_cpu()
CUDA_UNAVAILABLE_REASON: str | None = _load_cuda()


def require_backend(device: torch.device, name: str = "student_logits") -> None:
    """Raises where no kernel of ours serves the device, before the dispatcher fails with a longer story."""
    if device.type == "cuda" and CUDA_UNAVAILABLE_REASON is not None:
        raise RuntimeError(f"distillm_ext has no CUDA kernels here: {CUDA_UNAVAILABLE_REASON}.")
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on a CPU or CUDA device, got {device}.")


def release_gradient_memory() -> int:
    return torch.ops.distillm_ext.release_gradient_memory()


def cpu_instruction_set() -> str:
    return torch.ops.distillm_ext.cpu_instruction_set()


def torch_version_built() -> str:
    return torch.ops.distillm_ext.torch_version_built()


def cuda_architectures() -> str:
    """Architectures that the CUDA kernels were compiled for, empty without them."""
    return torch.ops.distillm_ext.cuda_architectures() if CUDA_UNAVAILABLE_REASON is None else ""
