"""Kernels and training for distilling language models.

Names are loaded on first use: `import distillm_ext._codec` needs no torch, `import distillm_ext` no transformers.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressed_logits import CompressedLogits
    from .compression import capture_from_hidden, compress_logits
    from .containers import DivergenceMetrics, SampledTokens, TeacherHead
    from .functional import (
        DIVERGENCES,
        alpha_beta_loss,
        distillation_loss,
        forward_kl_loss,
        generalized_js_loss,
        reverse_kl_loss,
        skew_kl_loss,
        skew_reverse_kl_loss,
        total_variation_loss,
    )
    from .information import build_info
    from .linear import linear_distillation_loss
    from .losses import (
        AdaptiveKLLoss,
        AlphaBetaLoss,
        DistillationLoss,
        ForwardKLLoss,
        GeneralizedJSLoss,
        LinearDistillationLoss,
        ReverseKLLoss,
        SkewKLLoss,
        SkewReverseKLLoss,
        TotalVariationLoss,
    )
    from .memory import empty_cache
    from .sampling import sample_tokens

try:
    __version__ = version("distillm_ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOME = {
    "compressed_logits": ("CompressedLogits",),
    "containers": ("DivergenceMetrics", "SampledTokens", "TeacherHead"),
    "compression": ("capture_from_hidden", "compress_logits"),
    "linear": ("linear_distillation_loss",),
    "functional": (
        "DIVERGENCES",
        "distillation_loss",
        "forward_kl_loss",
        "total_variation_loss",
        "generalized_js_loss",
        "alpha_beta_loss",
        "reverse_kl_loss",
        "skew_kl_loss",
        "skew_reverse_kl_loss",
    ),
    "losses": (
        "AdaptiveKLLoss",
        "AlphaBetaLoss",
        "DistillationLoss",
        "ForwardKLLoss",
        "GeneralizedJSLoss",
        "LinearDistillationLoss",
        "ReverseKLLoss",
        "SkewKLLoss",
        "SkewReverseKLLoss",
        "TotalVariationLoss",
    ),
    "information": ("build_info",),
    "memory": ("empty_cache",),
    "sampling": ("sample_tokens",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AdaptiveKLLoss",
    "AlphaBetaLoss",
    "CompressedLogits",
    "DIVERGENCES",
    "DistillationLoss",
    "DivergenceMetrics",
    "ForwardKLLoss",
    "GeneralizedJSLoss",
    "LinearDistillationLoss",
    "ReverseKLLoss",
    "SampledTokens",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "TeacherHead",
    "TotalVariationLoss",
    "__version__",
    "alpha_beta_loss",
    "build_info",
    "capture_from_hidden",
    "compress_logits",
    "distillation_loss",
    "empty_cache",
    "forward_kl_loss",
    "generalized_js_loss",
    "linear_distillation_loss",
    "reverse_kl_loss",
    "sample_tokens",
    "skew_kl_loss",
    "skew_reverse_kl_loss",
    "total_variation_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'distillm_ext' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
