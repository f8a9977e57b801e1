"""results/roofline.png from the CSV files of bench_divergence.py: how far the kernels are from the memory bound.

Left: measured bandwidth of value and gradient (inputs and gradient counted once) on this device, and a copy's. Right:
the CUDA kernels as counted by ptxsim, modelled on an H100: FP32-pipe instructions per byte that DRAM has to move, under
both ceilings. What is read again comes from the cache.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import harness
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# H100 SXM: bytes per second, and FP32-pipe instructions per second (132 multiprocessors, 128 lanes, 1.755 GHz).
DRAM, FP32 = 3.35e12, 132 * 128 * 1.755e9
MODELLED_ROWS = 4096

# One per member: there are more members than colours.
MARKERS = "osD^v<>PX*h"


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def draw_measured(axes: Any, rows: list[dict[str, str]], device: str) -> None:
    names = list(dict.fromkeys(row["divergence"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    height = 0.8 / max(len(dtypes), 1)
    for i, dtype in enumerate(dtypes):
        mine = [row for row in rows if row["dtype"] == dtype]
        places = [names.index(row["divergence"]) + (i - (len(dtypes) - 1) / 2) * height for row in mine]
        bars = axes.barh(places, [float(row["GB/s"]) for row in mine], height, label=dtype)
        copy = float(np.median([float(row["copy GB/s"]) for row in mine]))
        axes.axvline(copy, linestyle="--", color=bars.patches[0].get_facecolor(), label=f"copy, {dtype}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s")
    axes.set_title(f"Measured, {device}")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def draw_modelled(axes: Any, rows: list[dict[str, str]]) -> None:
    intensity = np.geomspace(2, 32, 64)
    axes.plot(intensity, np.minimum(intensity * DRAM, FP32) / 1e12, color="black", linewidth=1, label="H100 SXM")
    for place, name in enumerate(dict.fromkeys(row["divergence"] for row in rows)):
        mine = [row for row in rows if row["divergence"] == name]
        work = np.array([float(row["fp32"]) * MODELLED_ROWS * float(row["V"]) for row in mine])
        dram_ms, model_ms = (np.array([float(row[key]) for row in mine]) for key in ("dram ms", "model ms"))
        axes.scatter(
            work / (dram_ms * 1e-3 * DRAM),
            work / (model_ms * 1e9),
            s=30,
            marker=MARKERS[place % len(MARKERS)],
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("FP32-pipe instructions per byte of DRAM traffic")
    axes.set_ylabel("10^12 FP32-pipe instructions per second")
    axes.set_title("CUDA kernels, bf16: counted and modelled, no timing")
    axes.legend(fontsize=7, loc="lower right")


def publish(device: str) -> None:
    """Writes results/roofline.png from what results hold."""
    measured = read(harness.RESULTS / f"divergence_{device}.csv")
    modelled = read(harness.RESULTS / "divergence_cuda_counters.csv")
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    draw_measured(left, measured, device)
    draw_modelled(right, modelled)
    harness.save_figure(figure, "roofline.png")


if __name__ == "__main__":
    publish("cpu")
