"""Training: the configuration, the trainer, and the data and models that go in. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DistillationConfig": "config",
    "DistillationTrainer": "trainer",
    "DistillationCollator": "collators",
    "ReplayBuffer": "replay",
    "newest_complete_checkpoint": "checkpoint",
    "prepare_dataset": "data",
    "load_rows": "rows",
    "load_student": "models",
    "load_teacher": "models",
    "load_tokenizer": "models",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
