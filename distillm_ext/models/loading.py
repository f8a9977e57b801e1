"""Teachers and students by hub name, local folder, adapter folder or GGUF file; students cut out of their teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distillm_ext.models.adapters import adapter_base, merged_adapter
from distillm_ext.models.checks import check_causal, check_complete
from distillm_ext.models.layer_cut import cut_student, layer_list, middle_cut
from distillm_ext.models.spec import ModelSpec

__all__ = [
    "ModelSpec",
    "check_same_tokens",
    "cut_student",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "middle_cut",
]

ModelName = str | Path | Mapping[str, Any] | ModelSpec


def as_dtype(dtype: torch.dtype | str, name: str = "dtype") -> torch.dtype | None:
    """A floating-point type by name or as it is; None for "auto".

    Raises:
        ValueError: no floating-point type of torch; the message begins with `name`.
    """
    if dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name} must be auto, float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def _load(spec: ModelName, dtype: torch.dtype | str) -> PreTrainedModel:
    where, wanted = ModelSpec.parse(spec), as_dtype(dtype)
    base = adapter_base(where)
    if base is not None:
        return merged_adapter(_load(base, dtype), where)
    extra = where.keywords()
    if where.gguf_file:
        wanted = wanted or torch.float32
        if hasattr(transformers, "GgufConfig"):
            # Left in GGUF blocks the model could neither train nor be saved. Releases without the option unpack always.
            extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where.name, dtype=wanted or "auto", output_loading_info=True, **extra
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(
            f"{where.name!r} is no causal language model (its configuration is {_config_class(str(error))}); "
            "encoder-decoders, encoders and vision-language models cannot be distilled here"
        ) from None
    model, report = loaded
    check_causal(model, repr(where.name))
    check_complete(model, report, repr(where.name))
    return model


def _config_class(message: str) -> str:
    return message.partition("<class '")[2].partition("'>")[0].rpartition(".")[2] or "of another kind"


def load_teacher(spec: ModelName, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Load a causal language model, in eval mode and without gradients.

    The folder of an adapter (LoRA and others of PEFT) gives its base model with the adapter merged into it.

    Args:
        spec: hub name, folder, `.gguf` file, or a mapping {name, gguf_file, revision}.
        dtype: floating-point type of the weights, also by name ("bfloat16"). "auto" is the checkpoint's own, float32
            for a GGUF file.

    Raises:
        FileNotFoundError: the file or folder is not there.
        ValueError: an unusable specification or dtype, a model that is no causal language model, or one whose
            checkpoint lacks some of its weights (such as the head).

    Example:
        >>> teacher = load_teacher("models/SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    """
    return _load(spec, dtype).eval().requires_grad_(False)


def load_tokenizer(spec: ModelName) -> Any:
    """Load the tokenizer of a model; one without a padding token gets EOS as its padding token.

    An adapter's folder without tokenizer gives that of its base model.
    """
    where = ModelSpec.parse(spec)
    base = adapter_base(where)
    if base is not None and not (Path(where.name) / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    tokenizer = AutoTokenizer.from_pretrained(where.name, **where.keywords())
    if where.gguf_file:
        _take_ends(tokenizer, AutoConfig.from_pretrained(where.name, **where.keywords()))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {where.name!r} has neither a padding nor an EOS token; set one and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _take_ends(tokenizer: Any, config: Any) -> None:
    """Gives the tokenizer of a GGUF file the first and last token that the file names.

    transformers before 5.18 gives some of these tokenizers the first for both.
    """
    for name in ("bos_token", "eos_token"):
        token_id = getattr(config, f"{name}_id", None)
        if isinstance(token_id, int) and getattr(tokenizer, f"{name}_id") != token_id:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))


def check_same_tokens(student: Any, teacher: Any) -> None:
    """Raise `ValueError` unless two tokenizers give the same id to the same token: logits are compared by id."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    names = {index: token for token, index in theirs.items()}
    for token, index in ours.items():
        if names.get(index, token) != token:
            raise ValueError(
                f"the student's tokenizer differs from the teacher's: id {index} is {token!r} and {names[index]!r}. "
                "Distillation compares logits id by id; choose a teacher and a student of one tokenizer"
            )


def load_student(
    spec: ModelName, *, teacher: PreTrainedModel | None = None, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Load a student, or cut one out of the teacher.

    Args:
        spec: as in `load_teacher`, or {"layers": [0, 2, 5]} (indices of the teacher's layers, in the order wanted), or
            {"keep_layers": N} (the first ceil(N/2) and the last floor(N/2) layers). Each mapping may also have
            "dtype", which replaces the argument.
        teacher: needed by the two cuts.
        dtype: floating-point type of the student's weights; "auto" is the checkpoint's, of a cut the teacher's.

    Raises:
        ValueError: a cut without a teacher, an index out of range, an architecture without a list of layers.

    Example:
        >>> student = load_student({"keep_layers": 20, "dtype": "bfloat16"}, teacher=teacher)  # doctest: +SKIP
    """
    if isinstance(spec, Mapping):
        spec = dict(spec)
        dtype = spec.pop("dtype", dtype)
        as_dtype(dtype, "student.dtype")
    if not isinstance(spec, dict) or not {"layers", "keep_layers"} & set(spec):
        return _load(spec, dtype)
    if len(spec) != 1:
        raise ValueError(f"student: give one of layers, keep_layers, name, got the keys {sorted(spec)}")
    if teacher is None:
        raise ValueError("student: layers and keep_layers cut the student out of the teacher; give teacher=")
    target = as_dtype(dtype)
    if "layers" in spec:
        return cut_student(teacher, spec["layers"], dtype=target)
    return cut_student(teacher, middle_cut(layer_list(teacher)[1], spec["keep_layers"]), dtype=target)
