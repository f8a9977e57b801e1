"""What a student or a teacher must be: a causal language model, whole, and each with weights of its own."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.models.auto import modeling_auto

from distillm_ext.generation.loop.forward import base_of, unwrapped

_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
# Most of these hold causal models too, so the causal ones are looked up first.
_OTHER_KINDS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "a masked language model",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a classifier",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "a token classifier",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "a question answering model",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "a multiple choice model",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "a vision-language model",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "a multimodal model",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a speech model",
    "MODEL_MAPPING_NAMES": "a model without a language-model head",
}
_REMEDY = "load one with AutoModelForCausalLM.from_pretrained"


def check_causal(model: Any, name: str) -> None:
    """Refuses what is not a causal language model.

    Args:
        model: what was given; may be wrapped (PEFT, `torch.compile`).
        name: what to call it in messages.

    Raises:
        TypeError: a name or path in place of a model, an object of another class, a model without a language-model
            head, a classifier, a masked language model, an encoder-decoder, one inside DDP, nested or mixed adapters.
    """
    expected = f"{name}: expected a causal language model of transformers"
    if isinstance(model, (str, Path)):
        raise TypeError(f"{expected}, got the name {str(model)!r}; load it: AutoModelForCausalLM.from_pretrained(...)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{expected}, got {type(model).__name__}; {_REMEDY}")
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise TypeError(f"{expected}, got it inside {type(model).__name__}; pass the model itself (model.module)")
    causal = base_of(unwrapped(model), name)
    found = type(causal).__name__
    config = getattr(causal, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{expected}, got {found}, an encoder-decoder; {_REMEDY}")
    kind = _kind(causal)
    if kind is not None:
        raise TypeError(f"{expected}, got {found}, {kind}; {_REMEDY}")
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if config is None or head is None:
        raise TypeError(f"{expected}, got {found}, which has no language-model head; {_REMEDY}")
    if _looks_ahead(config):
        raise TypeError(
            f"{expected}, got {found} as an encoder: each token attends to those behind it; set is_decoder=True in its "
            "configuration, or choose a decoder"
        )


def _class_names(mapping: str) -> set[str]:
    names: set[str] = set()
    for value in getattr(modeling_auto, mapping, {}).values():
        names.update([value] if isinstance(value, str) else value)
    return names


def _kind(model: nn.Module) -> str | None:
    """What a model of transformers is other than a causal one, or None."""
    classes = {cls.__name__ for cls in type(model).__mro__}
    if classes & _class_names(_CAUSAL):
        return None
    return next((kind for mapping, kind in _OTHER_KINDS.items() if classes & _class_names(mapping)), None)


def _looks_ahead(config: Any) -> bool:
    """Whether a model of a family that has encoders and decoders is configured as an encoder."""
    kinds = (_CAUSAL, "MODEL_FOR_MASKED_LM_MAPPING_NAMES")
    both = all(getattr(config, "model_type", None) in getattr(modeling_auto, kind, {}) for kind in kinds)
    # XLM says it in its own word.
    return both and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def check_complete(model: nn.Module, report: Mapping[str, Any], name: str) -> None:
    """Refuses a model whose checkpoint lacks some of its weights: transformers fills them with random numbers.

    Args:
        model: as loaded.
        report: transformers' `loading_info`.
        name: what to call the model in messages.

    Raises:
        ValueError: names the weights.
    """
    own = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    lacking = sorted(own & set(report.get("missing_keys") or ()))
    lacking += sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys") or ())
    if lacking:
        raise ValueError(
            f"{name}: the checkpoint lacks {len(lacking)} weights of {type(model).__name__} ({', '.join(lacking[:3])}"
            f"{', …' if len(lacking) > 3 else ''}), which would be random; it is no whole causal language model"
        )


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher that shares a parameter with the student: training the one would change or freeze the other.

    Raises:
        ValueError: names the parameters.
    """
    if student is teacher:
        raise ValueError("teacher: is the same object as model; freezing it would freeze the student. Load it twice")
    mine = sorted(_places(student), key=lambda place: place[:2])
    starts = [place[:2] for place in mine]
    shared = []
    for device, start, end, name in _places(teacher):
        # Tied parameters of the student lie in one place, others apart: the last that begins before `end` decides.
        last = bisect.bisect_left(starts, (device, end)) - 1
        if last >= 0 and mine[last][0] == device and mine[last][2] > start:
            shared.append((mine[last][3], name))
    if shared:
        ours, theirs = shared[0]
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise ValueError(
            f"teacher: shares parameters with model ({theirs!r} is the student's {ours!r}{more}); freezing the teacher "
            "would freeze them, and training the student would change the teacher. Load the teacher once more, or "
            "pass a copy (copy.deepcopy) made before adapters were added"
        )


def _places(model: nn.Module) -> Iterator[tuple[str, int, int, str]]:
    """(device, first byte, last byte + 1, name) of each parameter; one without memory of its own is told by its id."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta or type(parameter).__name__ == "DTensor" or parameter.data_ptr() == 0:
            yield "object", id(parameter), id(parameter) + 1, name
        elif parameter.numel():
            steps = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            first = parameter.data_ptr()
            yield str(parameter.device), first, first + (steps + 1) * parameter.element_size(), name
