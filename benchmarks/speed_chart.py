"""results/divergence_cpu.png, the picture of the README, from divergence_cpu.csv. `bench_divergence.py` draws it anew.

A row per divergence, on it the milliseconds of one loss with gradient in float32: the eager formula, other projects,
the formula under torch.compile, and the kernel; at the right, how many times as long the formulas take.
"""

from __future__ import annotations

from typing import Any

import harness
import matplotlib
from roofline import read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Column of the CSV file, label, marker, colour; the kernel last, so that it lies on top.
CANDIDATES = (
    ("eager ms", "eager PyTorch", "s", "tab:gray"),
    ("trl ms", "TRL", "^", "tab:green"),
    ("liger ms", "Liger-Kernel", "v", "tab:red"),
    ("compile ms", "torch.compile", "D", "tab:orange"),
    ("ours ms", "distillm_ext", "o", "tab:blue"),
)


def draw(axes: Any, rows: list[dict[str, str]]) -> None:
    columns = [column for column, *_ in CANDIDATES]
    slowest = [max(float(row[column]) for column in columns if row[column]) for row in rows]
    axes.hlines(range(len(rows)), [float(row["ours ms"]) for row in rows], slowest, color="0.85", linewidth=2, zorder=0)
    for column, label, marker, color in CANDIDATES:
        measured = [(float(row[column]), place) for place, row in enumerate(rows) if row[column]]
        if measured:
            axes.scatter(*zip(*measured, strict=True), s=45, marker=marker, color=color, label=label)
    for column, x in (("eager / ours", 1.06), ("compile / ours", 1.18)):
        axes.text(x, 1.01, column.split()[0], transform=axes.transAxes, ha="center", va="bottom", color="0.3")
        for place, row in enumerate(rows):
            ratio = f"{float(row[column]):.1f}×" if row[column] else ""
            axes.text(x, place, ratio, transform=axes.get_yaxis_transform(), ha="center", va="center", color="0.3")


def dress(axes: Any, rows: list[dict[str, str]], device: str) -> None:
    axes.set_title(f"Loss and gradient in one call, {device.upper()}, float32")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 3)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("milliseconds, log scale (at the right: how many times as long as distillm_ext)")
    axes.set_yticks(range(len(rows)), [row["divergence"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(CANDIDATES), frameon=False)


def publish(device: str) -> None:
    """Writes results/divergence_<device>.png from the CSV file beside it."""
    rows = [row for row in read(harness.RESULTS / f"divergence_{device}.csv") if row["dtype"] == "float32"]
    if not rows:  # float32 was not measured
        return
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw(axes, rows)
    dress(axes, rows, device)
    harness.save_figure(figure, f"divergence_{device}.png")


if __name__ == "__main__":
    publish("cpu")
