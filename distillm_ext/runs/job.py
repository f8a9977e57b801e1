"""One run from settings to files: models, rows, trainer, outputs. What `distillm train` and the demo share."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback

from distillm_ext.data.rows.loading import load_rows
from distillm_ext.files import write_text
from distillm_ext.models.loading import check_same_tokens, load_student, load_teacher, load_tokenizer
from distillm_ext.paths import expand_path
from distillm_ext.runs.settings import DatasetSettings, RunSettings, settings_from_dict
from distillm_ext.teacher.manifest import MANIFEST as CACHE_MANIFEST
from distillm_ext.training.checkpoints.folders import list_checkpoints, newest_complete_checkpoint
from distillm_ext.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)

SETTINGS_FILE, LOG_FILE, MODEL_FOLDER = "settings.yaml", "log.json", "final"


@dataclass
class Models:
    """What a run loads: the student is trained in float32 unless `student.dtype` says otherwise (mixed precision is
    `bf16` of the training settings).

    Attributes:
        teacher: None where a cache takes its place.
        cache: folder of a cache of the teacher's output, or None.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: Any
    cache: Path | None = None


def load_models(settings: RunSettings, teacher_dtype: str) -> Models:
    """Load teacher, student and the tokenizer they share.

    Args:
        settings: of the run.
        teacher_dtype: as `DistillationConfig` has checked it.

    Raises:
        FileNotFoundError, ValueError: as `load_teacher`, `load_student`; two tokenizers that differ; or a student that
            is cut from a teacher of which there is only a cache.
    """
    source, cache = split_teacher_setting(settings.teacher)
    cut = isinstance(settings.student, dict) and bool({"layers", "keep_layers"} & set(settings.student))
    # A student that is cut out of the teacher starts from its weights before any rounding; the trainer then gives the
    # teacher its dtype.
    dtype = "auto" if cut else teacher_dtype
    named = settings.student
    if isinstance(named, dict):
        named = {key: value for key, value in named.items() if key != "dtype"}
    if source is None:
        if cut:
            raise ValueError(
                f"student: is cut from the teacher's layers, and teacher: {cache} is a cache without layers; name the "
                "model too (teacher: {name: ..., cache: ...}), or a student of its own"
            )
        return Models(load_student(settings.student), None, load_tokenizer(named), cache)
    teacher = load_teacher(source, dtype)
    tokenizer = load_tokenizer(source)
    if cut:
        return Models(load_student(settings.student, teacher=teacher), teacher, tokenizer, cache)
    own = load_tokenizer(named)
    check_same_tokens(own, tokenizer)
    return Models(load_student(settings.student), teacher, own, cache)


def split_teacher_setting(teacher: str | dict[str, Any]) -> tuple[str | dict[str, Any] | None, Path | None]:
    """(model or None, cache or None) that the settings' `teacher` names; a folder with a cache's manifest is one."""
    named = {"name": teacher} if isinstance(teacher, str) else dict(teacher)
    cache = named.pop("cache", None)
    cache = None if cache is None else expand_path(str(cache), "teacher.cache")
    name = expand_path(str(named.get("name")), "teacher")
    if cache is None and set(named) == {"name"} and (Path(name) / CACHE_MANIFEST).is_file():
        return None, Path(name)
    if not named:
        return None, Path(str(cache))
    return teacher if isinstance(teacher, str) else named, None if cache is None else Path(cache)


def load_splits(settings: DatasetSettings, *, need_responses: bool = True) -> tuple[Dataset, Dataset | None]:
    """Training rows and validation rows (None where none are configured); these always need responses."""
    train = load_rows(
        settings.train, split=settings.train_split, subset=settings.subset, columns=settings.columns,
        need_responses=need_responses,
    )  # fmt: skip
    if settings.eval is None and settings.eval_split is None:
        return train, None
    heldout = load_rows(
        settings.eval or settings.train,
        split=settings.eval_split or "train",
        subset=settings.subset,
        columns=settings.columns,
        need_responses=True,
    )
    return train, heldout


def build_trainer(
    settings: RunSettings,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    models: Models | None = None,
    splits: tuple[Dataset, Dataset | None] | None = None,
) -> DistillationTrainer:
    """The trainer of a run; settings and rows are checked before models are loaded, which takes longest.

    Args:
        settings: checked settings.
        callbacks: in place of transformers' own progress bar.
        models, splits: already loaded; None loads what the settings name.
    """
    args = settings.training_arguments()
    train, heldout = splits or load_splits(settings.dataset, need_responses=args.needs_responses)
    if heldout is None and args.eval_strategy != "no":
        raise ValueError(
            f"training.eval_strategy is {args.eval_strategy.value!r} and dataset.eval is not set; name validation rows"
        )
    loaded = models if models is not None else load_models(settings, args.teacher_dtype)
    trainer = DistillationTrainer(
        model=loaded.student,
        teacher=loaded.teacher,
        teacher_cache=loaded.cache,
        args=args,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=loaded.tokenizer,
        callbacks=list(callbacks),
    )
    if callbacks:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    return trainer


def start_folder(settings: RunSettings, *, resume: bool) -> tuple[str | None, list[str]]:
    """Prepare `output_dir` and say where to resume.

    With `resume`: the newest complete checkpoint, if there is one. Without: checkpoints of an earlier run are moved
    aside, since a later resume would otherwise take one of them for this run's.

    Returns:
        checkpoint folder or None; names of settings that changed since the checkpoint's run.
    """
    folder = settings.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    newest = newest_complete_checkpoint(folder) if resume else None
    changed = _changed_settings(folder, settings) if newest else []
    earlier = list_checkpoints(folder)
    if not resume and earlier:
        aside = next(folder / f"earlier-{n}" for n in range(1, 10_000) if not (folder / f"earlier-{n}").exists())
        aside.mkdir()
        for checkpoint in earlier:
            os.replace(checkpoint, aside / checkpoint.name)
        logger.warning("checkpoints of an earlier run were moved to %s", aside)
    write_settings(settings)
    return newest, changed


def write_settings(settings: RunSettings) -> Path:
    """Write the settings to `output_dir`, in the form that `distillm train` reads."""
    path = settings.output_dir / SETTINGS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(settings.as_dict(), sort_keys=False, allow_unicode=True))
    return path


def _changed_settings(folder: Path, settings: RunSettings) -> list[str]:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return []
    before = settings_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), str(path)).as_dict()
    now = settings.as_dict()
    changed = []
    for group in now:
        old, new = before.get(group), now[group]
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted({*old, *new})
            changed += [f"{group}.{key}" for key in keys if old.get(key) != new.get(key)]
        elif old != new:
            changed.append(group)
    return changed


def save_outputs(trainer: DistillationTrainer) -> Path:
    """Write the student and its tokenizer (`final/`) and the log (`log.json`); returns the model's folder.

    Every process calls it: a sharded student is gathered.
    """
    folder = Path(str(trainer.args.output_dir))
    final = folder / MODEL_FOLDER
    trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        write_text(folder / LOG_FILE, json.dumps(trainer.state.log_history, indent=1, ensure_ascii=False))
    return final


def count_parameters(model: Any) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
