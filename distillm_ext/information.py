"""What this installation is: versions, instruction set, CUDA kernels."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import torch

from . import __version__
from .ops import extension


def build_info() -> dict[str, Any]:
    """Facts about this installation, for bug reports and `distillm info`.

    Returns:
        version, python, torch, torch_built (the torch that compiled the extension), numpy, cpu_isa (the instruction set
        the CPU kernels use), cuda_archs (compiled architectures, empty without CUDA kernels), cuda_loaded, cuda_reason
        (why the CUDA kernels are not loaded, else empty), cuda_device (name of the first GPU, else empty).

    Example:
        >>> from distillm_ext import build_info
        >>> build_info()["cpu_isa"]
        'x86-64-v3'
    """
    reason = extension.CUDA_UNAVAILABLE_REASON
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_built": extension.torch_version_built(),
        "numpy": numpy.__version__,
        "cpu_isa": extension.cpu_instruction_set(),
        "cuda_archs": extension.cuda_architectures(),
        "cuda_loaded": reason is None,
        "cuda_reason": reason or "",
        "cuda_device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
    }
