"""`distillm train`: distil a student as a YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distillm_ext.cli.options import expanded

INTERRUPTED = 130
STOPPED_BY_NAN = 1


def train(
    config: Annotated[
        Path, typer.Argument(callback=expanded, help="YAML file with the keys student, teacher, dataset, training.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Dotted settings that replace the file's, same as --set."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A dotted setting, as training.learning_rate=1e-4. Repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from the newest complete checkpoint in output_dir (start anew where there is none), or start "
            "anew and move checkpoints found there aside.",
        ),
    ] = True,
) -> None:
    """Distil a student: the trained model goes to OUTPUT_DIR/final, the log to log.json, a plot to training.png.

    training.output_dir defaults to runs/NAME-OF-THE-FILE. On several processes: torchrun --nproc_per_node N --no-python
    distillm train CONFIG.yaml
    """
    import os

    from rich.console import Console

    from distillm_ext.cli.errors import friendly_errors

    quiet = os.environ.get("RANK", "0") != "0"
    console = Console(quiet=quiet)
    with friendly_errors():
        from distillm_ext.runs.settings import load_settings

        chosen = load_settings(config, [*(overrides or []), *(settings or [])])
    command = f"distillm train {config} --resume"
    raise typer.Exit(run(chosen, resume=resume, console=console, command=command))


def run(settings: Any, *, resume: bool, console: Any, command: str) -> int:
    """Train and save; returns the exit code: `INTERRUPTED` after Ctrl-C, `STOPPED_BY_NAN` where a loss, gradient or
    weight is NaN or inf: nothing is saved then."""
    import sys

    from distillm_ext.cli.errors import friendly_errors
    from distillm_ext.runs.job import build_trainer, count_parameters, start_folder
    from distillm_ext.runs.progress import ProgressBar, StopOnInterrupt

    bar, stop = ProgressBar(console), StopOnInterrupt(console)
    try:
        with friendly_errors():
            console.print("loading models and rows …")
            trainer = build_trainer(settings, callbacks=[bar, stop])
            checkpoint = _prepare_folder(trainer, settings, resume, console, start_folder)
        console.print(_sides(trainer, count_parameters))
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except FloatingPointError as error:
            print(f"error: {error}", file=sys.stderr)
            return STOPPED_BY_NAN
        finally:
            bar.close()
            stop.close()
    except KeyboardInterrupt:
        stop.stopped = True
    if stop.stopped:
        console.print(f"stopped. Go on with:\n  {command}", highlight=False, soft_wrap=True)
        return INTERRUPTED
    _finish(trainer, console)
    return 0


def _sides(trainer: Any, count_parameters: Any) -> str:
    """Student and teacher in a line."""
    parts = [f"student {count_parameters(trainer.model) / 1e6:.2f} M parameters"]
    if trainer.teacher is not None:
        parts.append(f"teacher {count_parameters(trainer.teacher.model) / 1e6:.2f} M")
    if trainer.run.cache is not None:
        parts.append(f"teacher logits of {len(trainer.run.cache)} rows from {trainer.run.cache.path}")
    return ", ".join(parts)


def _prepare_folder(trainer: Any, settings: Any, resume: bool, console: Any, start_folder: Any) -> str | None:
    """The first process prepares the folder while the others wait; all agree on the checkpoint."""
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None, []]
    if trainer.is_world_process_zero():
        found = list(start_folder(settings, resume=resume))
    if trainer.args.world_size > 1:
        broadcast_object_list(found)
    checkpoint, changed = found
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint} (--no-resume starts anew)", highlight=False, soft_wrap=True)
    if changed:
        console.print(
            f"warning: settings changed since that checkpoint: {', '.join(changed)}", highlight=False, soft_wrap=True
        )
    return checkpoint


def _finish(trainer: Any, console: Any) -> None:
    from distillm_ext.evaluation.plots import plot_training
    from distillm_ext.runs.job import save_outputs

    final = save_outputs(trainer)
    if not trainer.is_world_process_zero():
        return
    console.print(f"student saved to {final}", highlight=False, soft_wrap=True)
    history = trainer.state.log_history
    if "reuse_disk_mib" in (history[-1] if history else {}):
        console.print(f"kept teacher logits: {history[-1]['reuse_disk_mib']:.1f} MiB")
    if any("loss" in entry for entry in history):
        plot = plot_training(history, final.parent / "training.png", warmup_steps=trainer.args.warmup_objective_steps)
        console.print(f"plot: {plot}", highlight=False, soft_wrap=True)
