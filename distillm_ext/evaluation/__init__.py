"""Evaluation: metrics of a student against its teacher, reports, plots. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "EvaluationResult": "metrics",
    "evaluate_student": "metrics",
    "divergence_metrics": "metrics",
    "rouge_l": "metrics",
    "plot_training": "plots",
    "write_report": "report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
