"""Training: the configuration, the trainer, and the data and models that go in. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "DistillationConfig": "training.config",
    "DistillationTrainer": "training.trainer",
    "DistillationCollator": "data.batches",
    "ReplayBuffer": "training.rollouts.replay",
    "newest_complete_checkpoint": "training.checkpoints.folders",
    "prepare_dataset": "data.tokenise",
    "load_rows": "data.rows.loading",
    "load_student": "models.loading",
    "load_teacher": "models.loading",
    "load_tokenizer": "models.loading",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"distillm_ext.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
