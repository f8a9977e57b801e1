"""Callbacks of a run at a terminal: a progress bar with the numbers that matter, and an orderly stop by Ctrl-C."""

from __future__ import annotations

import signal
import threading
import types
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


def make_progress(console: Console) -> Progress:
    """The bar that every command uses."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def summarise(logs: dict[str, Any]) -> str:
    """One log entry in a line: losses, φ, where the batches came from, speed."""
    parts = []
    for key, form in (("loss", "loss {:.3f}"), ("eval_loss", "validation CE {:.3f}"), ("eval_divergence", "KL {:.3f}")):
        if logs.get(key) is not None:
            parts.append(form.format(logs[key]))
    if logs.get("phi") is not None:
        parts.append(f"φ {logs['phi']:.2f}")
    sources = [f"{name} {int(logs[f'batches_{name}'])}" for name in ("data", "fresh", "replay", "teacher", "epoch")
               if logs.get(f"batches_{name}")]  # fmt: skip
    if sources:
        parts.append("batches " + ", ".join(sources))
    if logs.get("reused_rows"):
        parts.append(f"teacher {logs['teacher_rows']:.0f} rows, reused {logs['reused_rows']:.0f}")
    if logs.get("nan_steps"):
        parts.append(f"left out {logs['nan_steps']} steps of NaN or inf")
    if logs.get("tokens_per_second") is not None:
        parts.append(f"{logs['tokens_per_second']:.0f} tokens/s")
    return " · ".join(parts)


class ProgressBar(TrainerCallback):
    """A bar over optimizer steps at a terminal; without one (a file, CI) a line per log entry."""

    def __init__(self, console: Console, description: str = "distilling") -> None:
        self.console = console
        self.description = description
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = make_progress(self.console)
        self._progress.start()
        self._task = self._progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, note=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        line = summarise(logs or {})
        if not line or not state.is_world_process_zero:
            return
        if self._progress is not None and "loss" in (logs or {}):
            self._progress.update(self._task, note=line)
        else:
            self.console.print(f"step {state.global_step}/{state.max_steps}: {line}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an exception."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the current step, writes a checkpoint and stops; the second one stops at once.

    Several processes would have to agree on the step to stop at: there Ctrl-C is left alone, and a run goes on from its
    newest complete checkpoint.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stopped = False
        self._previous: Any = None
        self._installed = False

    def _on_signal(self, signum: int, frame: types.FrameType | None) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, self._previous)
        self.console.print("stopping: the step is finished and saved first (Ctrl-C again: stop at once)")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal) or signal.default_int_handler
            self._installed = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def close(self) -> None:
        """Put the former signal handler back."""
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
            self._installed = False
