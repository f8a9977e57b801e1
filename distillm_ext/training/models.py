"""Teachers and students by hub name, local folder or GGUF file; students cut out of their teacher."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

__all__ = [
    "ModelSpec",
    "check_same_tokens",
    "cut_student",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "middle_cut",
]

# Lists of a configuration that may be as long as there are layers and mean something else.
_NOT_PER_LAYER = ("token_id", "architectures")


@dataclass(frozen=True)
class ModelSpec:
    """Where a model is: `name` is a hub name or a folder, `gguf_file` the file there that holds the weights."""

    name: str
    gguf_file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, spec: str | Path | Mapping[str, Any] | ModelSpec) -> ModelSpec:
        """Understand "hub/name", "folder", "path/model.gguf" or {"name": ..., "gguf_file": ..., "revision": ...}.

        Raises:
            FileNotFoundError: a GGUF file or a folder that is not there.
            ValueError: unknown keys, or a folder with several GGUF files and no configuration.
        """
        if isinstance(spec, ModelSpec):
            return spec
        if isinstance(spec, Mapping):
            unknown = sorted(set(spec) - {"name", "gguf_file", "revision"})
            if unknown or not isinstance(spec.get("name"), str):
                raise ValueError(f"a model is a string or {{name, gguf_file, revision}} with a name, got {dict(spec)}")
            named = cls(spec["name"], spec.get("gguf_file"), spec.get("revision"))
            folder = Path(named.name)
            if named.gguf_file and folder.is_dir() and not (folder / named.gguf_file).is_file():
                raise FileNotFoundError(f"no GGUF file {named.gguf_file!r} in {folder}; {_gguf_listing(folder)}")
            if named.gguf_file:
                return named
            found = cls._parse_string(named.name)
            return cls(found.name, found.gguf_file, named.revision)
        return cls._parse_string(str(spec))

    @classmethod
    def _parse_string(cls, text: str) -> ModelSpec:
        path = Path(text)
        if path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise FileNotFoundError(
                    f"no GGUF file at {text!r}; {_gguf_listing(path.parent)}. For a file on the hub write "
                    "{name: owner/model, gguf_file: file.gguf}"
                )
            return cls(str(path.parent), path.name)
        if path.is_dir() and not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            if len(files) != 1:
                raise ValueError(
                    f"{text!r} has no config.json; {_gguf_listing(path)}: name one file, or another folder"
                )
            return cls(text, files[0])
        if not path.exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
            raise FileNotFoundError(f"no model folder at {text!r}; give an existing folder, a .gguf file or a hub name")
        return cls(text)

    def keywords(self) -> dict[str, Any]:
        """Arguments for every `from_pretrained`."""
        if self.gguf_file and sys.version_info < (3, 11):
            _tell_gguf_version()
        chosen = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {key: value for key, value in chosen.items() if value is not None}


def _tell_gguf_version() -> None:
    """Gives the module gguf its version: on Python 3.10 transformers looks for it there alone, and gguf has none."""
    if importlib.util.find_spec("gguf") is not None:
        module = importlib.import_module("gguf")
        module.__version__ = importlib.metadata.version("gguf")  # type: ignore[attr-defined]


def _gguf_listing(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf")) if folder.is_dir() else []
    return f"GGUF files in {str(folder)!r}: {', '.join(files) or 'none'}"


def _as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found


def _load(spec: str | Path | Mapping[str, Any] | ModelSpec, dtype: torch.dtype | str) -> PreTrainedModel:
    where = ModelSpec.parse(spec)
    extra = where.keywords()
    if where.gguf_file and hasattr(transformers, "GgufConfig"):
        # Left in GGUF blocks the model could neither train nor be saved. Releases without the option unpack always.
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(where.name, dtype=_as_dtype(dtype), **extra)


def load_teacher(
    spec: str | Path | Mapping[str, Any] | ModelSpec, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Load a causal language model, in eval mode and without gradients.

    Args:
        spec: hub name, folder, `.gguf` file, or a mapping {name, gguf_file, revision}.
        dtype: floating-point type of the weights, also by name ("bfloat16").

    Raises:
        FileNotFoundError: the file or folder is not there.
        ValueError: an unusable specification or dtype.

    Example:
        >>> teacher = load_teacher("models/SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    """
    return _load(spec, dtype).eval().requires_grad_(False)


def load_tokenizer(spec: str | Path | Mapping[str, Any] | ModelSpec) -> Any:
    """Load the tokenizer of a model; one without a padding token gets EOS as its padding token."""
    where = ModelSpec.parse(spec)
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
    spec: str | Path | Mapping[str, Any] | ModelSpec,
    *,
    teacher: PreTrainedModel | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:
    """Load a student, or cut one out of the teacher.

    Args:
        spec: as in `load_teacher`, or {"layers": [0, 2, 5]} (indices of the teacher's layers, in the order wanted), or
            {"keep_layers": N} (the first ceil(N/2) and the last floor(N/2) layers).
        teacher: needed by the two cuts.
        dtype: floating-point type of the student's weights.

    Raises:
        ValueError: a cut without a teacher, an index out of range, an architecture without a list of layers.

    Example:
        >>> student = load_student({"keep_layers": 20}, teacher=teacher)  # doctest: +SKIP
    """
    if not isinstance(spec, Mapping) or not {"layers", "keep_layers"} & set(spec):
        return _load(spec, dtype)
    if len(spec) != 1:
        raise ValueError(f"student: give one of layers, keep_layers, name, got the keys {sorted(spec)}")
    if teacher is None:
        raise ValueError("student: layers and keep_layers cut the student out of the teacher; give teacher=")
    if "layers" in spec:
        return cut_student(teacher, spec["layers"], dtype=dtype)
    return cut_student(teacher, middle_cut(_layer_list(teacher)[1], spec["keep_layers"]), dtype=dtype)


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


def _layer_list(model: PreTrainedModel) -> tuple[str, int]:
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
    teacher: PreTrainedModel, layers: Sequence[int], *, dtype: torch.dtype | str | None = None
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
    prefix, count = _layer_list(teacher)
    chosen = _check_layers(layers, count)
    config = _cut_config(teacher.config, chosen, count)
    target = teacher.dtype if dtype is None else _as_dtype(dtype)
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
