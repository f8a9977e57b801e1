"""Folders that hold an adapter (LoRA and others of PEFT) and not a whole model: the base model with it merged in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from distillm_ext.models.spec import ADAPTER_CONFIG, ModelSpec

_WEIGHTS = "adapter_model.safetensors"


def adapter_base(where: ModelSpec) -> ModelSpec | None:
    """The base model that an adapter's folder names, or None for a folder or name that is no adapter's.

    Raises:
        ValueError: the folder does not say which model it adapts.
    """
    file = Path(where.name) / ADAPTER_CONFIG
    if where.gguf_file or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); save the adapter again") from error
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{file}: base_model_name_or_path is missing, so the adapter's base model is not known; merge the adapter "
            "(merge_and_unload) and save the whole model"
        )
    parsed = ModelSpec.parse(base)
    return ModelSpec(parsed.name, parsed.gguf_file, config.get("revision"))


def merged_adapter(base: PreTrainedModel, where: ModelSpec) -> PreTrainedModel:
    """`base` with the adapter of the folder merged into its weights, in their dtype.

    Args:
        base: the adapter's base model; it is changed in place.
        where: the adapter's folder.

    Raises:
        ValueError: PEFT is not installed, or an adapter that is not one of the weights (prompt and prefix tuning).
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise ValueError(
            f"{where.name!r} holds an adapter, and PEFT is not installed: pip install 'distillm_ext[lora]', or merge "
            "the adapter (merge_and_unload) and save the whole model"
        ) from None
    if PeftConfig.from_pretrained(where.name).is_prompt_learning:
        raise ValueError(
            f"{where.name!r} holds virtual tokens (prompt or prefix tuning), which cannot be merged into a model's "
            "weights; use an adapter of the weights, such as LoRA"
        )
    _make_room(base, Path(where.name) / _WEIGHTS)
    # PEFT checks every key of the file against the model and names those that do not fit.
    model: Any = PeftModel.from_pretrained(base, where.name)
    merged = model.merge_and_unload()
    merged.generation_config = base.generation_config
    if (Path(where.name) / GENERATION_CONFIG_NAME).is_file():
        merged.generation_config = GenerationConfig.from_pretrained(where.name)
    return merged


def _make_room(base: PreTrainedModel, file: Path) -> None:
    """Adds embedding rows where the adapter was trained with tokens that its base model lacks."""
    embedding: Any = base.get_input_embeddings()
    name = next((name for name, module in base.named_modules() if module is embedding), None)
    if name is None or not file.is_file():
        return
    with safe_open(file, "pt") as stored:
        rows = [
            stored.get_slice(key).get_shape()[0]
            for key in stored.keys()
            if f".{name}." in f".{key}" and key.endswith("weight") and ".lora_" not in key
        ]
    if rows and max(rows) > embedding.weight.shape[0]:
        base.resize_token_embeddings(max(rows), mean_resizing=False)
