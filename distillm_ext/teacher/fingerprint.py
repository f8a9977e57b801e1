"""Fingerprints: what tells a teacher, a tokenizer or a data set from another. SHA-256, as hexadecimal text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# What changes with the place, the library or the run, but not with the function that the model computes.
_VOLATILE = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation",
    "architectures",  # the class that saved it, unset before
)  # fmt: skip
_PIECE = 1 << 24  # elements
_MODULUS = 1 << 256


def fingerprint_model(model: Any) -> str:
    """Of a model: its configuration and every parameter and buffer of its state, by name, shape and values.

    Independent of device, path, sharding of the files and version of transformers. Weights are compared as numbers:
    bfloat16 weights widened to float32 are the same model, float32 weights rounded to bfloat16 are another one.

    Args:
        model: a torch module; its `config` counts too where it has one.
    """
    import torch

    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    digest.update(_canonical(_lasting(values)))
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 4
        dtype = torch.float32 if narrow else tensor.dtype
        digest.update(_canonical([name, str(dtype), list(tensor.shape)]))
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            digest.update(piece.to("cpu", dtype).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _lasting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is volatile, in configurations inside of this one neither."""
    kept = {name: value for name, value in values.items() if name not in _VOLATILE}
    return {name: _lasting(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Of a tokenizer: its vocabulary, rules, special tokens and chat template; not its truncation and padding state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in getattr(tokenizer, "special_tokens_map", {}).items()}
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(_canonical([rules, special, template])).hexdigest()


def fingerprint_dataset(rows: Iterable[Any]) -> str:
    """Of a data set: its rows and how often each occurs, in any order.

    Args:
        rows: mappings of JSON values and arrays (such as a `datasets.Dataset`), strings, or rows of token ids.
    """
    total = count = 0
    for row in rows:
        total += int.from_bytes(hashlib.sha256(_canonical(row)).digest(), "little")
        count += 1
    return hashlib.sha256(f"{count}:{total % _MODULUS}".encode()).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)
