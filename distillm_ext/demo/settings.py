"""What a demo is going to do: its YAML file (beside this module) with overrides, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from distillm_ext.runs.coercion import CoercionError, coerce, field_types
from distillm_ext.runs.settings import RunSettings, check_keys, settings_from_dict
from distillm_ext.runs.settings_tree import Given, SettingsError, Tree, apply_override, parse_tree, place_of, plain

TOP_LEVEL = ("demo", "student", "training")


@dataclass(frozen=True)
class DemoOptions:
    """What the demo itself needs beside a run's settings.

    Attributes:
        train_rows, heldout_rows: rows for training, and for validation and the table.
        validation_rows: the first of the held-out rows, which set φ during training.
        generate_rows: held-out rows that responses are generated for.
        max_new_tokens: most tokens of those responses.
        batch_size: rows per batch of the evaluations.
        samples: responses shown in the report.
        max_characters: rows with more text than that are left out, 0 takes all (real rows only).
        teacher_steps: optimizer steps of the teacher (tiny world only).
        seed: of the tiny world, or of the order of the real rows.
    """

    train_rows: int
    heldout_rows: int
    validation_rows: int
    generate_rows: int
    max_new_tokens: int
    batch_size: int = 8
    samples: int = 3
    max_characters: int = 0
    teacher_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train_rows", "heldout_rows", "validation_rows", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"demo.{name}: expected an int >= 1, got {getattr(self, name)}")
        for name in ("generate_rows", "validation_rows"):
            if getattr(self, name) > self.heldout_rows:
                raise SettingsError(
                    f"demo.{name}: expected at most heldout_rows ({self.heldout_rows}), got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Plan:
    """Checked options, and a run's settings that still lack the teacher and the data set."""

    options: DemoOptions
    student: Any
    training: dict[str, Any]

    def settings(self, *, teacher: Path, train: Path, validation: Path, output_dir: Path) -> RunSettings:
        """Settings of the distillation run, as `distillm train` takes them."""
        return settings_from_dict(
            {
                "student": self.student,
                "teacher": str(teacher),
                "dataset": {"train": str(train), "eval": str(validation)},
                "training": {**self.training, "output_dir": str(output_dir)},
            },
            "demo settings",
        )

    def control(self, settings: RunSettings, output_dir: Path) -> RunSettings:
        """The SFT control: the same rows, steps and optimizer; cross-entropy alone, no teacher, no responses."""
        training = {**settings.training, "output_dir": str(output_dir), "policy": "dataset", "eval_strategy": "no"}
        training |= {"warmup_objective": "sft", "warmup_objective_steps": training["max_steps"]}
        return settings_from_dict({**settings.as_dict(), "training": training}, "SFT control")


def load_plan(name: str, overrides: Sequence[str] = ()) -> Plan:
    """Read `demo.yaml` or `tiny.yaml`.

    Args:
        name: the file's name.
        overrides: "dotted.key=value" strings, as demo.train_rows=100 or training.max_steps=20.

    Raises:
        SettingsError: an unknown key or a value of the wrong type.
    """
    tree = parse_tree((Path(__file__).parent / name).read_text(encoding="utf-8"), name)
    for override in overrides:
        apply_override(tree, override)
    check_keys(tree, TOP_LEVEL, "", name)
    training = plain(tree["training"])
    # The demo's own checks come first, before anything is fetched: the paths are stand-ins.
    checked = settings_from_dict(
        {"student": plain(tree["student"]), "teacher": "teacher", "dataset": "rows.jsonl", "training": training}, name
    )
    if checked.training.get("max_steps", 0) < 1:
        raise SettingsError(f"training.max_steps ({name}): expected an int >= 1, the length of both arms")
    return Plan(_options(tree["demo"], name), checked.student, checked.training)


def _options(tree: Given | Tree, name: str) -> DemoOptions:
    if isinstance(tree, Given):
        raise SettingsError(f"demo: expected a mapping ({tree.place})")
    check_keys(tree, [item.name for item in fields(DemoOptions)], "demo.", name)
    types, values = field_types(DemoOptions), {}
    for key, given in tree.items():
        try:
            values[key] = coerce(plain(given), given.raw if isinstance(given, Given) else None, types[key])
        except CoercionError as error:
            raise SettingsError(f"demo.{key}: {error} ({place_of(given)})") from error
    return DemoOptions(**values)
