"""Kernels and training for distilling language models.

Names are loaded on first use: `import distillm_ext._codec` needs no torch, `import distillm_ext` no transformers.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("distillm_ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOME = {
    "distillation_loss": "functional",
    "forward_kl_loss": "functional",
    "reverse_kl_loss": "functional",
    "skew_kl_loss": "functional",
    "skew_reverse_kl_loss": "functional",
    "DIVERGENCES": "functional",
    "DistillationLoss": "losses",
    "ForwardKLLoss": "losses",
    "ReverseKLLoss": "losses",
    "SkewKLLoss": "losses",
    "SkewReverseKLLoss": "losses",
    "build_info": "build_info",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distillm_ext' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
