"""Runs stages one after the other, each within its limit and what is left of the whole; loses nothing when it is cut.

A stage that fails, hangs or dies never stops the next one; only a machine without the device does. SIGTERM, SIGINT and
SIGHUP end the running stage, write state and table, and leave with what was found.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import process
from .book import Book
from .plan import FAILED, NO_DEVICE, PARTLY, PASSED, SKIPPED, Stage

ROOT = Path(__file__).resolve().parents[2]
# What stays for writing results and leaving, beside the stages.
RESERVE_SECONDS = 10.0
_LEAST_SECONDS = 1.0
_SAVE_SECONDS = 5.0
_WORDS = {PASSED: "passed", FAILED: "failed", NO_DEVICE: "no device", PARTLY: "partly", SKIPPED: "skipped"}
# Exit statuses of the check.
EXIT_PASSED, EXIT_FAILED, EXIT_NO_DEVICE, EXIT_UNDONE = range(4)
_UNDONE = ("partly", "cut", "not begun")


class Stopped(Exception):
    """A signal asked the check to end."""


@dataclass
class Runner:
    """One call of the check.

    Args:
        stages: what to run, in order.
        book: where results go.
        limit: seconds for everything, from now.
        device: "cuda" or "cpu".
        reserve: seconds of `limit` that no stage gets.
    """

    stages: Sequence[Stage]
    book: Book
    limit: float
    device: str
    reserve: float = RESERVE_SECONDS
    begun: float = field(default_factory=time.monotonic)
    call: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    signals: list[int] = field(default_factory=list)
    saved: float = 0.0

    def run(self) -> int:
        """Returns the exit status of the check."""
        names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {name: signal.signal(name, lambda number, _: self.signals.append(number)) for name in names}
        try:
            for stage in self.stages:
                if not self._one(stage):
                    break
        except Stopped:
            self.book.log.line(f"ended by signal {self.signals[0]}")
        finally:
            self.book.save()
            for name, handler in before.items():
                signal.signal(name, handler)
        self._summary()
        return self._status()

    def _one(self, stage: Stage) -> bool:
        """Whether the next stage can follow."""
        book = self.book
        if book.passed(stage.name) and not stage.always:
            book.log.line(f"== {stage.name}: passed before")
            return True
        left = self.limit - (time.monotonic() - self.begun) - self.reserve
        if left < _LEAST_SECONDS:
            self._note(stage, "not begun", 0.0)
            return True
        limit = min(stage.limit, left)
        book.log.line(f"== {stage.name}: up to {limit:.0f} s")
        self._note(stage, "cut", 0.0)  # what is to be read should this process be killed outright
        begun, word = time.monotonic(), "cut"
        try:
            word = self._outcome(stage, limit)
        finally:
            self._note(stage, word, time.monotonic() - begun)
        return word != "no device"

    def _outcome(self, stage: Stage, limit: float) -> str:
        environment = self.environment(stage, limit)
        try:
            status = process.run(
                stage.command, limit, folder=ROOT, environment=environment, sink=self.book.log, tick=self._tick
            )
        except OSError as error:
            self.book.log.line(f"{stage.command[0]} cannot be started: {error}")
            return "failed"
        if status is not None:
            return _WORDS.get(status, f"died ({status})")
        # Past a limit of its own something hangs; short of that, another call may finish it.
        return "hung" if limit >= stage.limit else "cut"

    def environment(self, stage: Stage, limit: float) -> dict[str, str]:
        """What a stage is told. Stages end by themselves a little before they would be killed."""
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONUNBUFFERED": "1",
            "DEVICE_CHECK_STAGE": stage.name,
            "DEVICE_CHECK_OUT": str(self.book.out.resolve()),
            "DEVICE_CHECK_DEVICE": self.device,
            "DEVICE_CHECK_DEADLINE": str(time.monotonic() + limit - min(3.0, limit / 10)),
            "DEVICE_CHECK_RUN": self.call,
        }

    def _tick(self) -> None:
        if self.signals:
            raise Stopped
        if time.monotonic() - self.saved > _SAVE_SECONDS:
            self.book.save()
            self.saved = time.monotonic()

    def _note(self, stage: Stage, word: str, seconds: float) -> None:
        self.book.stages[stage.name] = {"status": word, "seconds": round(seconds, 1)}
        self.book.save()

    def _summary(self) -> None:
        rows = [(stage.name, self.book.stages.get(stage.name, {"status": "not begun"})) for stage in self.stages]
        lines = [f"{name:<10} {row['status']:<10} {row.get('seconds', 0):6.1f} s" for name, row in rows]
        self.book.log.line("\n".join(["", *lines, f"results in {self.book.out}"]))

    def _status(self) -> int:
        words = [self.book.stages.get(stage.name, {"status": "not begun"})["status"] for stage in self.stages]
        if "no device" in words:
            return EXIT_NO_DEVICE
        if any(word not in ("passed", "skipped", *_UNDONE) for word in words):
            return EXIT_FAILED
        return EXIT_UNDONE if any(word in _UNDONE for word in words) else EXIT_PASSED
