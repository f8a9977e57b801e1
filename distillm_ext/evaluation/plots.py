"""The course of a training run as one picture: losses, φ, batch sources, time shares over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillm_ext.files import move_into_place

History = Sequence[Mapping[str, Any]]
_SOURCES = {"data": "#4c72b0", "teacher": "#8172b3", "epoch": "#937860", "fresh": "#dd8452", "replay": "#55a868"}
_SHARES = {
    "generation": "#dd8452",
    "teacher": "#8172b3",
    "student": "#4c72b0",
    "loss": "#c44e52",
    "other": "#bbbbbb",
}


def plot_training(log_history: History, path: str | Path, *, title: str = "", warmup_steps: int = 0) -> Path:
    """Draw a run's log.

    Args:
        log_history: `trainer.state.log_history` (or the JSON that `distillm train` writes of it).
        path: PNG or SVG to write; written beside and renamed.
        title: heading of the picture.
        warmup_steps: steps of the warm-up objective, shaded.

    Raises:
        ValueError: the log holds no training step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [entry for entry in log_history if "loss" in entry and "step" in entry]
    if not steps:
        raise ValueError("log_history: holds no training step to plot; train with logging_steps at most max_steps")
    target = Path(path)
    figure = Figure(figsize=(9, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 2, 2))
    _draw_losses(axes[0], steps)
    _draw_validation(axes[1], log_history)
    _draw_sources(axes[2], steps)
    _draw_times(axes[3], steps)
    for axis in axes:
        if warmup_steps:
            axis.axvspan(0, warmup_steps, color="#eeeeee", zorder=0)
        axis.grid(True, alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        if handles:
            axis.legend(handles, labels, loc="center left", bbox_to_anchor=(1.13, 0.5), frameon=False, fontsize=9)
    axes[-1].set_xlabel("optimizer step" + (" (shaded: warm-up objective)" if warmup_steps else ""))
    axes[-1].set_xlim(left=0)
    if title:
        figure.suptitle(title)
    temporary = target.with_name(f".{target.name}.tmp{target.suffix}")
    figure.savefig(temporary, dpi=120)
    move_into_place(temporary, target)
    return target


def _series(entries: History, key: str) -> tuple[list[float], list[float]]:
    found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None and "step" in entry]
    return [step for step, _ in found], [value for _, value in found]


def _draw_losses(axis: Any, steps: History) -> None:
    """Total and parts; the parts only where there is more than one."""
    axis.plot(*_series(steps, "loss"), label="loss", color="black", linewidth=1.2)
    parts = {"loss_divergence": "divergence", "loss_ce": "cross-entropy", "loss_lm": "plain-text LM"}
    present = {key: name for key, name in parts.items() if _series(steps, key)[0]}
    if len(present) > 1:
        for (key, name), colour in zip(present.items(), ("#4c72b0", "#dd8452", "#55a868"), strict=False):
            marker = "." if len(_series(steps, key)[0]) < 100 else None
            axis.plot(*_series(steps, key), label=name, color=colour, linewidth=1, marker=marker)
    axis.set_ylabel("training loss\n(nats per token)")


def _draw_validation(axis: Any, history: History) -> None:
    axis.plot(*_series(history, "eval_loss"), label="cross-entropy", color="#4c72b0", marker="o")
    axis.plot(*_series(history, "eval_divergence"), label="KL to teacher", color="#c44e52", marker="s")
    axis.set_ylabel("validation\n(nats per token)")
    axis.set_ylim(bottom=0)


def _stacked_bars(axis: Any, steps: History, series: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> None:
    """One bar per log entry, over the steps since the one before; series that are 0 throughout are left out."""
    xs = [entry["step"] for entry in steps]
    lefts = [0, *xs[:-1]]
    widths = [right - left for left, right in zip(lefts, xs, strict=True)]
    floor = [0.0] * len(xs)
    for name, values in series.items():
        if any(values):
            axis.bar(
                lefts, values, width=widths, bottom=floor, align="edge", color=colours[name], label=name, alpha=0.8
            )
            floor = [low + value for low, value in zip(floor, values, strict=True)]


def _draw_sources(axis: Any, steps: History) -> None:
    """Share of the optimizer steps by source since the last log; φ on the same scale."""
    counts = {name: [float(entry.get(f"batches_{name}") or 0) for entry in steps] for name in _SOURCES}
    totals = [max(sum(values), 1.0) for values in zip(*counts.values(), strict=True)]
    shares = {
        name: [count / total for count, total in zip(values, totals, strict=True)] for name, values in counts.items()
    }
    _stacked_bars(axis, steps, shares, _SOURCES)
    phi = _series(steps, "phi")
    if phi[0]:
        axis.step(*phi, where="post", label="φ", color="black", linewidth=1.5)
    axis.set_ylabel("batch source\n(share), φ")
    axis.set_ylim(0, 1.02)


def _draw_times(axis: Any, steps: History) -> None:
    shares = {name: [float(entry.get(f"time_{name}") or 0.0) for entry in steps] for name in _SHARES}
    _stacked_bars(axis, steps, shares, _SHARES)
    axis.set_ylabel("time\n(share)")
    axis.set_ylim(0, 1.02)
    speed = _series(steps, "tokens_per_second")
    if speed[0]:
        twin = axis.twinx()
        twin.plot(*speed, color="black", linewidth=1)
        twin.set_ylabel("tokens/s (black line)")
        twin.set_ylim(bottom=0)
