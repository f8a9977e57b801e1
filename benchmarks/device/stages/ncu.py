"""Where the time inside our largest kernels goes, by the counters of the hardware."""

from __future__ import annotations

import csv
from functools import partial
from typing import Any

from .. import tools
from ..stage import Check, Skipped

# What runs, its rows and vocabulary, and the kernel to look at.
KERNELS = (
    ("skew_kl", 2048, 128256, "divergence_kernel"),
    ("skew_kl", 2048, 50257, "divergence_kernel"),
    ("topk_logits", 2048, 151936, "topk_logits_kernel"),
)
SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
SECONDS = 27.0
_SHOWN = {"Duration": "us", "DRAM Throughput": "dram %", "Compute (SM) Throughput": "sm %"}


def _rows(text: str) -> list[dict[str, str]]:
    """The table in ncu's output, which has lines of other kinds before it."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return list(csv.DictReader(lines))


def profiled(check: Check, name: str, rows: int, vocab: int, kernel: str) -> dict[str, Any]:
    log = check.out / "ncu.csv"
    command = [tools.find("ncu"), "--clock-control", "none", "--kernel-name", f"regex:{kernel}"]
    command += ["--launch-skip", "2", "--launch-count", "1", "--csv"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    status, text = tools.run([*command, *tools.watched(name, rows, vocab)], min(SECONDS, check.left() - 1))
    tools.keep(log, f"{name} bfloat16 {rows} x {vocab}, exit status {status}", text)
    found = _rows(text)
    if not found:
        raise Skipped(f"ncu gave no counters (exit status {status}): {tools.last_line(text)}")
    shown = {r.get("Metric Name"): f"{r.get('Metric Value')} {r.get('Metric Unit')}" for r in found}
    return {"metrics": len(found), **{label: shown[metric] for metric, label in _SHOWN.items() if metric in shown}}


def run(check: Check) -> None:
    if not check.cuda:
        tools.rehearse(check, "skew_kl", 4, 1001)
    tools.find("ncu")
    check.cases(
        (f"{name} {rows} x {vocab}", partial(profiled, check, name, rows, vocab, kernel))
        for name, rows, vocab, kernel in KERNELS
    )
