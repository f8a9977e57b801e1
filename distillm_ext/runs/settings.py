"""A run's settings: one YAML file and overrides, checked field by field before anything is loaded.

    student: {keep_layers: 20}
    teacher: models/teacher
    dataset: {train: train.jsonl, eval: heldout.jsonl}
    training: {output_dir: runs/first, policy: adaptive_off_policy, learning_rate: 1e-4}

The teacher may be a cache of its output that `distillm capture` made (teacher: caches/first), or a model and a cache
(teacher: {name: models/teacher, cache: caches/first}).

Paths may begin with `~` and hold environment variables. Every message names the key, the file and the line (or the
override) it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distillm_ext.generation.sampling import SamplingParams
from distillm_ext.paths import expand_path
from distillm_ext.runs.coercion import CoercionError, coerce, field_types
from distillm_ext.runs.settings_tree import (
    Given,
    SettingsError,
    Tree,
    apply_override,
    collect_places,
    parse_tree,
    place_of,
    plain,
)

__all__ = ["DatasetSettings", "RunSettings", "SettingsError", "load_settings", "settings_from_dict"]

TOP_LEVEL = ("student", "teacher", "dataset", "training")
MODEL_KEYS = ("name", "gguf_file", "revision")
STUDENT_KEYS = (*MODEL_KEYS, "layers", "keep_layers", "dtype")
TEACHER_KEYS = (*MODEL_KEYS, "cache")
_PATHS = ("name", "gguf_file", "cache", "train", "eval")


@dataclass(frozen=True)
class DatasetSettings:
    """Where the rows come from; see `distillm_ext.training.load_rows`.

    Attributes:
        train: source of the training rows.
        eval: source of the validation rows; None with `eval_split` set takes `train`'s source.
        train_split: split of `train`, slices allowed ("train[:900]").
        eval_split: split of the validation source; None is "train" for a source of its own.
        subset: configuration name of a hub data set.
        columns: our column name -> the name in the source.
    """

    train: str
    eval: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    subset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSettings:
    """Checked settings of `distillm train`; `places` maps a dotted key to where it was given."""

    student: str | dict[str, Any]
    teacher: str | dict[str, Any]
    dataset: DatasetSettings
    training: dict[str, Any]
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def output_dir(self) -> Path:
        """Folder of the run; the configuration expands it for itself."""
        return Path(expand_path(self.training["output_dir"], "training.output_dir"))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the YAML file would hold them."""
        rows = {key: value for key, value in dataclasses.asdict(self.dataset).items() if value not in (None, {})}
        return {"student": self.student, "teacher": self.teacher, "dataset": rows, "training": dict(self.training)}

    def training_arguments(self) -> Any:
        """The `DistillationConfig`; a value out of range is reported with its place.

        Raises:
            SettingsError: a field of the configuration is not legal.
        """
        from distillm_ext.training.config import DistillationConfig

        try:
            return DistillationConfig(**self.training)
        except (ValueError, TypeError, ImportError) as error:
            named = re.match(r"(\w+):", str(error))
            place = self.places.get(f"training.{named.group(1)}") if named else None
            raise SettingsError(f"training.{error} ({place})" if place else f"training: {error}") from error


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> RunSettings:
    """Read and check a YAML file.

    Args:
        path: the file.
        overrides: "dotted.key=value" strings that replace or add to what the file says; the value is YAML.

    Raises:
        FileNotFoundError: no such file.
        SettingsError: broken YAML, an unknown key (the nearest legal one is suggested), a value of the wrong type.

    Example:
        >>> load_settings("run.yaml", ["training.learning_rate=1e-4"]).training["learning_rate"]  # doctest: +SKIP
        0.0001
    """
    file = Path(expand_path(path, "settings file"))
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such settings file")
    tree = parse_tree(file.read_text(encoding="utf-8"), str(file))
    for override in overrides:
        apply_override(tree, override)
    return _check(tree, str(file))


def settings_from_dict(values: Mapping[str, Any], source: str) -> RunSettings:
    """Check settings given as plain values; `source` stands in messages for the file."""
    return _check(parse_tree(yaml.safe_dump(dict(values)), source), source)


def _check(tree: Tree, source: str) -> RunSettings:
    check_keys(tree, TOP_LEVEL, "", source)
    missing = [name for name in TOP_LEVEL[:3] if name not in tree]
    if missing:
        raise SettingsError(f"{source}: the key {missing[0]!r} is missing; top-level keys are {', '.join(TOP_LEVEL)}")
    training = tree.get("training", {})
    if isinstance(training, Given):
        if training.value is not None:
            raise SettingsError(f"training: expected a mapping of fields, got {training.value!r} ({training.place})")
        training = {}
    places: dict[str, str] = {}
    collect_places(tree, "", places)
    return RunSettings(
        student=_model(tree["student"], "student", STUDENT_KEYS, source),
        teacher=_model(tree["teacher"], "teacher", TEACHER_KEYS, source),
        dataset=_dataset(tree["dataset"], source),
        training=_training(training, source),
        places=places,
    )


def check_keys(tree: Mapping[str, Any], legal: Iterable[str], prefix: str, source: str) -> None:
    """Raise `SettingsError` for a key that is not legal, with the nearest legal one."""
    names = list(legal)
    for key, value in tree.items():
        if key in names:
            continue
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        if near:
            advice = f"did you mean {near[0]!r}?"
        elif len(names) <= 12:
            advice = f"legal keys are {', '.join(names)}"
        else:
            advice = "it is no field of DistillationConfig"
        raise SettingsError(f"unknown key '{prefix}{key}' ({place_of(value) or source}): {advice}")


def _model(given: Given | Tree, name: str, legal: Sequence[str], source: str) -> str | dict[str, Any]:
    if isinstance(given, dict):
        check_keys(given, legal, f"{name}.", source)
        return {key: _path(value, f"{name}.{key}") if key in _PATHS else plain(value) for key, value in given.items()}
    if not isinstance(given.value, str) or not given.value:
        raise SettingsError(
            f"{name}: expected a hub name, a folder, a .gguf file or a mapping of {', '.join(legal)}; "
            f"got {given.value!r} ({given.place})"
        )
    return _path(given, name)


def _path(given: Given | Tree, key: str) -> Any:
    """A value with `~` and environment variables replaced where it is text."""
    value = plain(given)
    if not isinstance(value, str):
        return value
    try:
        return expand_path(value, key)
    except ValueError as error:
        raise SettingsError(f"{error} ({place_of(given)})") from error


def _dataset(given: Given | Tree, source: str) -> DatasetSettings:
    tree: Tree = {"train": given} if isinstance(given, Given) else given
    check_keys(tree, [item.name for item in dataclasses.fields(DatasetSettings)], "dataset.", source)
    if "train" not in tree:
        raise SettingsError(f"dataset.train is missing ({place_of(tree) or source}): name a file or a hub data set")
    values = _coerce_all(tree, field_types(DatasetSettings), "dataset.")
    paths = {key: _path(tree[key], f"dataset.{key}") for key in _PATHS if isinstance(values.get(key), str)}
    return DatasetSettings(**values | paths)


def _training(tree: Tree, source: str) -> dict[str, Any]:
    from distillm_ext.training.config import DistillationConfig

    types = field_types(DistillationConfig)
    check_keys(tree, types, "training.", source)
    sampling = tree.get("sampling")
    if isinstance(sampling, dict):
        check_keys(sampling, field_types(SamplingParams), "training.sampling.", source)
    values = _coerce_all(tree, types, "training.")
    values.setdefault("output_dir", str(Path("runs") / Path(source).stem))
    if values["output_dir"] is None:
        raise SettingsError(
            f"training.output_dir: expected a folder, got null ({place_of(tree['output_dir'])}); YAML reads a bare ~ "
            "as null: write ~/runs"
        )
    return values


def _coerce_all(tree: Tree, types: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    values = {}
    for key, given in tree.items():
        raw = given.raw if isinstance(given, Given) else None
        try:
            values[key] = coerce(plain(given), raw, types[key])
        except CoercionError as error:
            raise SettingsError(f"{prefix}{key}: {error} ({place_of(given)})") from error
    return values
