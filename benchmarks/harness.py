"""What every benchmark shares: interleaved timing, peak memory, tables, CSV."""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from device import clock
from rich.console import Console
from rich.table import Table

import distillm_ext

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def medians(candidates: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds of each candidate, measured in turns, so that a disturbance of the machine hits all of them."""
    for function in candidates.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            samples[name].append(clock.seconds(function, device))
    return {name: statistics.median(values) for name, values in samples.items()}


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """Largest sum of tensor memory that `function` holds at once beyond what was there before."""
    function()
    distillm_ext.empty_cache()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def environment() -> Row:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "load": round(load, 2)}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """With what every benchmark of an operator takes."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--rounds", type=int, default=rounds)
    return found


def begin(options: argparse.Namespace) -> None:
    """Sets the number of threads and says on what the figures are taken."""
    torch.set_num_threads(options.threads)
    print(environment())


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def publish(title: str, rows: Sequence[Row], file: str) -> None:
    """Prints the rows as a table and writes them to results/<file>."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(cell(row.get(name, "")) for name in columns))
    Console(width=max(240, Console().width)).print(table)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / file
    temporary = target.with_suffix(".tmp")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(target)


def save_figure(figure: Any, name: str) -> None:
    """Writes a matplotlib figure to results/<name>, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    target = RESULTS / name
    temporary = target.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(target)
    print(f"wrote {target}")
