"""The demo: cut a student, train an SFT control and a distilled student from it, measure all, write a report.

Both arms start from the same weights and take the same number of optimizer steps over the same rows; the warm-up counts
as steps of the distilled arm.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from distillm_ext.data.rows.loading import load_rows
from distillm_ext.data.tokenise import prepare_dataset
from distillm_ext.demo.settings import DemoOptions, Plan
from distillm_ext.evaluation.metrics import EvaluationResult, Progress, evaluate_student, generate_texts
from distillm_ext.evaluation.plots import plot_training
from distillm_ext.evaluation.report import Report, write_report
from distillm_ext.files import write_text
from distillm_ext.generation import SamplingParams
from distillm_ext.runs.job import (
    Models,
    build_trainer,
    count_parameters,
    load_models,
    load_splits,
    save_outputs,
    write_settings,
)
from distillm_ext.runs.progress import ProgressBar
from distillm_ext.runs.settings import RunSettings

START, CONTROL, DISTILLED, TEACHER = "student before", "SFT control", "distilled", "teacher"


@dataclass(frozen=True)
class World:
    """A teacher and rows on disk: what a demo starts from."""

    teacher: Path
    train: Path
    heldout: Path
    validation: Path


@dataclass(frozen=True)
class DemoOutcome:
    """What came of a demo.

    Attributes:
        results: metrics by model.
        batches: optimizer steps of the distilled arm by source (data, fresh, replay).
        student: folder of the distilled student.
        report: the report file.
        plot: the picture.
    """

    results: dict[str, EvaluationResult]
    batches: dict[str, int]
    student: Path
    report: Path
    plot: Path


def write_world_rows(folder: Path, rows: Sequence[Mapping[str, Any]], options: DemoOptions, teacher: Path) -> World:
    """Write training, held-out and validation rows as JSONL files, in the order given."""
    needed = options.train_rows + options.heldout_rows
    if len(rows) < needed:
        raise ValueError(
            f"demo.train_rows + demo.heldout_rows is {needed}, and there are {len(rows)} rows; ask for fewer"
        )
    heldout = rows[options.train_rows : needed]
    parts = {
        "train": rows[: options.train_rows],
        "heldout": heldout,
        "validation": heldout[: options.validation_rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return World(teacher, *(folder / f"{name}.jsonl" for name in parts))


class Demo:
    """One demo, from a world to a report.

    Args:
        plan: options and settings.
        world: teacher and rows.
        output: folder of everything written.
        console: rich console.
        progress: makes a context that yields a callback (stage, done, total) under a description.
    """

    def __init__(self, plan: Plan, world: World, output: Path, console: Any, progress: Any) -> None:
        self.plan, self.world, self.output, self.console, self.progress = plan, world, output, console, progress
        self.settings = plan.settings(
            teacher=world.teacher, train=world.train, validation=world.validation, output_dir=output / "distilled"
        )
        args = self.settings.training_arguments()
        self.models = load_models(self.settings, args.teacher_dtype)
        self.splits = load_splits(self.settings.dataset)
        self.device = args.device
        self.heldout = prepare_dataset(
            load_rows(world.heldout),
            self.models.tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_length=args.max_length,
            source=world.heldout.name,
            chat_template_kwargs=args.template_kwargs,
        )
        self.seconds: dict[str, float] = {}
        self.texts: dict[str, list[str]] = {}

    def run(self) -> DemoOutcome:
        """Everything, in turn."""
        student, teacher = count_parameters(self.models.student), count_parameters(self.models.teacher)
        self.console.print(
            f"teacher {teacher / 1e6:.2f} M parameters, student {student / 1e6:.2f} M", highlight=False, soft_wrap=True
        )
        start = copy.deepcopy(self.models.student)
        results = {START: self._measure(START, self.models.student)}
        control = self.plan.control(self.settings, self.output / "sft_control")
        trained, _ = self._train(CONTROL, control, copy.deepcopy(start))
        results[CONTROL] = self._measure(CONTROL, trained)
        del trained
        trained, history = self._train(DISTILLED, self.settings, start)
        results[DISTILLED] = self._measure(DISTILLED, trained)
        # Its divergence from itself is known; its cross-entropy and responses are what the student could reach.
        assert self.models.teacher is not None  # the demo has a model
        results[TEACHER] = replace(self._measure(TEACHER, self.models.teacher), kl=0.0, agreement=1.0)
        batches = {name: sum(int(entry.get(f"batches_{name}", 0)) for entry in history)
                   for name in ("data", "fresh", "replay")}  # fmt: skip
        return self._write(results, batches, history)

    def _measure(self, name: str, model: PreTrainedModel) -> EvaluationResult:
        begun, options = time.perf_counter(), self.plan.options
        teacher: Any = self.models.teacher
        moved: Any = model
        with self.progress(f"{name}: ") as update:
            result = evaluate_student(
                moved.to(self.device),
                self.heldout,
                self.models.tokenizer,
                teacher=None if model is teacher else teacher.to(self.device),
                batch_size=options.batch_size,
                generate_rows=options.generate_rows,
                max_new_tokens=options.max_new_tokens,
                progress=update,
            )
            self.texts[name] = self._samples(model, update)
        self.seconds[f"measuring {name}"] = time.perf_counter() - begun
        divergence = "" if model is teacher else f"KL {result.kl:.3f}, "
        self.console.print(
            f"{name}: {divergence}cross-entropy {result.cross_entropy:.3f}, ROUGE-L {result.rouge_l:.1f}",
            highlight=False,
            soft_wrap=True,
        )
        return result

    def _samples(self, model: PreTrainedModel, update: Progress) -> list[str]:
        count = min(self.plan.options.samples, len(self.heldout))
        if count == 0:
            return []
        rows = self.heldout.select(range(count))
        options = self.plan.options
        return generate_texts(
            model,
            rows,
            self.models.tokenizer,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            sampling=SamplingParams(temperature=0.0),
            seed=0,
        )[0]

    def _train(
        self, name: str, settings: RunSettings, student: PreTrainedModel
    ) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        begun = time.perf_counter()
        set_seed(settings.training_arguments().seed)
        splits: tuple[Dataset, Dataset | None] = self.splits
        if settings.training["eval_strategy"] == "no":
            splits = (splits[0], None)
        bar = ProgressBar(self.console, name)
        shutil.rmtree(settings.output_dir, ignore_errors=True)
        trainer = build_trainer(
            settings,
            callbacks=[bar],
            models=Models(student, self.models.teacher, self.models.tokenizer),
            splits=splits,
        )
        try:
            trainer.train()
        finally:
            bar.close()
        write_settings(settings)
        save_outputs(trainer)
        self.seconds[f"training {name}"] = time.perf_counter() - begun
        return trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history

    def _write(
        self, results: dict[str, EvaluationResult], batches: dict[str, int], history: list[dict[str, Any]]
    ) -> DemoOutcome:
        warmup = int(self.settings.training.get("warmup_objective_steps", 0))
        plot = plot_training(
            history, self.output / "training.png", title="Distillation: the run's log", warmup_steps=warmup
        )
        gained = {name: results[name].kl - results[DISTILLED].kl for name in (START, CONTROL)}
        steps = self.settings.training["max_steps"]
        sources = ", ".join(f"{count} on {name}" for name, count in batches.items())
        notes = [
            f"Both arms: {steps} optimizer steps from the same cut student; the first {warmup} of the distilled "
            f"arm are its warm-up. Steps of the distilled arm by source of the batch: {sources}.",
            f"KL to the teacher, distilled against the student before: {-gained[START]:+.3f}; against the SFT control: "
            f"{-gained[CONTROL]:+.3f} nats per token.",
            f"φ follows the cross-entropy of the first {self.plan.options.validation_rows} held-out rows, which "
            "training sees in no other way.",
            "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items()) + ".",
        ]
        prompts = [
            self.models.tokenizer.decode(row["input_ids"][: row["prompt_length"]], skip_special_tokens=True)
            for row in self.heldout.select(range(min(self.plan.options.samples, len(self.heldout))))
        ]
        samples = [(prompt, {name: self.texts[name][i] for name in results}) for i, prompt in enumerate(prompts)]
        report = write_report(
            Report("Distillation demo", results, self.settings.as_dict(), notes, plot.name, samples),
            self.output / "report.md",
        )
        table = {name: result.as_dict() for name, result in results.items()}
        write_text(self.output / "results.json", json.dumps({"results": table, "batches": batches}, indent=1) + "\n")
        return DemoOutcome(results, batches, self.output / "distilled" / "final", report, plot)
