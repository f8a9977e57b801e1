"""Where a model is: a hub name, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_ext.paths import expand_path
from distillm_ext.teacher.manifest import MANIFEST

# What PEFT writes beside the weights of an adapter.
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelSpec:
    """Where a model is: `name` is a hub name or a folder, `gguf_file` the file there that holds the weights."""

    name: str
    gguf_file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, spec: str | Path | Mapping[str, Any] | ModelSpec) -> ModelSpec:
        """Understand "hub/name", "folder", "path/model.gguf" or {"name": ..., "gguf_file": ..., "revision": ...}.

        `~` and environment variables are replaced.

        Raises:
            FileNotFoundError: a GGUF file or a folder that is not there.
            TypeError: neither text nor a mapping.
            ValueError: unknown keys, a file or folder that holds no model, or one with several GGUF files and no
                configuration.
        """
        if isinstance(spec, ModelSpec):
            return spec
        if isinstance(spec, Mapping):
            unknown = sorted(set(spec) - {"name", "gguf_file", "revision"})
            if unknown or not isinstance(spec.get("name"), str):
                raise ValueError(f"a model is a string or {{name, gguf_file, revision}} with a name, got {dict(spec)}")
            named = cls(expand_path(spec["name"], "name"), spec.get("gguf_file"), spec.get("revision"))
            folder = Path(named.name)
            if named.gguf_file and folder.is_dir() and not (folder / named.gguf_file).is_file():
                raise FileNotFoundError(f"no GGUF file {named.gguf_file!r} in {folder}; {_gguf_listing(folder)}")
            if named.gguf_file:
                return named
            found = cls._parse_string(named.name)
            return cls(found.name, found.gguf_file, named.revision)
        if not isinstance(spec, (str, Path)):
            raise TypeError(f"a model is named by a string, a path or a mapping, got {type(spec).__name__}")
        return cls._parse_string(expand_path(spec, "model"))

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
        if path.is_file():
            raise ValueError(f"{text!r} is a file; a model is a folder, a .gguf file or a hub name")
        if (path / MANIFEST).is_file() and not (path / "config.json").is_file():
            raise ValueError(f"{text!r} is a cache of a teacher's output, not a model; name the model's folder")
        inside = sorted(file.parent.name for file in path.glob(f"*/{ADAPTER_CONFIG}"))
        if inside and not (path / "config.json").is_file():
            # PEFT saves an adapter named "default" into the folder itself and any other into a folder of its name.
            raise ValueError(
                f"{text!r} holds adapters in {', '.join(inside)}; name the one that is meant: {path / inside[0]}"
            )
        if (path / ADAPTER_CONFIG).is_file():
            return cls(text)
        if path.is_dir() and not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            if len(files) != 1:
                raise ValueError(
                    f"{text!r} has no config.json; {_gguf_listing(path)}: name one file, or another folder"
                )
            return cls(text, files[0])
        if not path.exists() and (text.startswith((".", "/")) or text.count("/") > 1):
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
