"""Kinds of arguments that several commands share."""

from __future__ import annotations

from typing import Any

import typer

from distillm_ext.paths import expand_path


def expanded(parameter: typer.CallbackParam, value: Any) -> Any:
    """Callback of an option that names a file, folder or model: replaces `~` and environment variables.

    A shell does so for a word of its own (`--out ~/x`) but not inside one (`--out=~/x`).
    """
    if value is None:
        return None
    try:
        return type(value)(expand_path(value, parameter.name or "path"))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


DATASET_HELP = "JSONL, JSON or Parquet file, folder or hub name"
DTYPE_HELP = "float32, bfloat16, float16, or auto: that of the checkpoint (GGUF: float32)."
