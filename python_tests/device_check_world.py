"""Stages of a line each for the tests of `benchmarks/device_check.py`, and what a check of them leaves."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from device import book as books
from device import process as processes
from device import runner as runners
from device.plan import Stage

ROOT = Path(__file__).resolve().parent.parent
LONG = 60.0


def python(name: str, source: str, limit: float = LONG, always: bool = False) -> Stage:
    return Stage(name, limit, (sys.executable, "-c", source), always)


def ending(name: str, status: int = 0, **options: bool) -> Stage:
    return python(name, f"raise SystemExit({status})", **options)


def measuring(name: str, case: str, then: str = "") -> Stage:
    """Records one result as a stage does, leaves a mark that it ran, then does something else."""
    source = f"from device.stage import Check\nCheck.from_environment().record({case!r}, ms=1.5)\n{then}"
    return python(name, source)


def check(out: Path, *stages: Stage, limit: float = LONG, state: Path | None = None, key: str = "key") -> int:
    return runners.Runner(stages, books.Book(out, key, state), limit, "cpu", reserve=0.0).run()


def statuses(out: Path) -> dict[str, str]:
    return {name: stage["status"] for name, stage in json.loads((out / "state.json").read_text())["stages"].items()}


def cases(out: Path) -> list[str]:
    return [result["case"] for result in books.read(out / "results.jsonl")]


class Clock:
    """The time, which makes a leap once something has happened: no test waits for a limit."""

    def __init__(self, happened: Callable[[], bool], leap: float) -> None:
        self.happened, self.leap = happened, leap
        self.sleep = time.sleep

    def monotonic(self) -> float:
        return time.monotonic() + (self.leap if self.happened() else 0.0)

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (processes, runners):
            monkeypatch.setattr(module, "time", self)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"  # ended, nobody waits for it
