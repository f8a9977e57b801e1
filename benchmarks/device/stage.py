"""What a stage is given: a `Check`.

A stage is a module `stages/<name>.py` with a function `run(check)`, in a process of its own (`__main__`). Most of them
are a list of cases, each tried by itself: `Check.cases`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from . import book
from .plan import FAILED, PARTLY, PASSED, SKIPPED

# A case: what to call it, and what measures it; its values become one line of results.jsonl.
Case = tuple[str, Callable[[], dict[str, Any] | None]]


class Skipped(Exception):
    """Something that a case or a stage needs is not here; the message says what."""


class TimeIsUp(BaseException):
    """Raised into a case that is still running at the deadline; no handler of the case's own may take it."""


class NoDevice(Exception):
    """Nothing after this stage can run; the message says why."""


@dataclass
class Check:
    """What a stage knows and what it has found.

    Attributes:
        stage: its name.
        out: folder for results.
        device: "cuda" or "cpu".
        deadline: when to stop beginning new cases, by `time.monotonic`, which all processes of a machine share.
        run: the call of the check that this is part of.
    """

    stage: str
    out: Path
    device: str
    deadline: float
    run: str
    failed: bool = field(default=False, init=False)
    left_out: int = field(default=0, init=False)
    slowest: float = field(default=0.0, init=False)

    @classmethod
    def from_environment(cls) -> Check:
        value = {name: os.environ[f"DEVICE_CHECK_{name}"] for name in ("STAGE", "OUT", "DEVICE", "DEADLINE", "RUN")}
        return cls(value["STAGE"], Path(value["OUT"]), value["DEVICE"], float(value["DEADLINE"]), value["RUN"])

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds until new cases are no longer begun."""
        return self.deadline - time.monotonic()

    def results(self, stage: str | None = None) -> list[book.Result]:
        return [r for r in book.read(self.out / "results.jsonl") if r.get("stage") == (stage or self.stage)]

    def write(self, case: str, *, ok: bool = True, **values: Any) -> book.Result:
        """One line of results.jsonl, on the disk when this returns."""
        rounded = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in values.items()}
        result = {"stage": self.stage, "case": case, "ok": ok, **rounded, "run": self.run}
        book.append(self.out / "results.jsonl", result)
        self.failed |= not ok
        return result

    def record(self, case: str, *, ok: bool = True, **values: Any) -> None:
        """The same, and a line of the log."""
        self.write(case, ok=ok, **values)
        shown = (f"{v:.4g} {k}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{'' if ok else 'FAILED '}{case}: {', '.join(shown) or 'right'}", flush=True)

    def finished(self) -> set[str]:
        """Cases that need no other try: those that went well at any time, and all that this call has tried."""
        return self.passed_before() | {r["case"] for r in self.results() if r.get("run") == self.run}

    def passed_before(self) -> set[str]:
        """Cases that went well in an earlier call; what was missing then may be there now."""
        return {r["case"] for r in self.results() if r["ok"] and "skipped" not in r and r.get("run") != self.run}

    def failures(self) -> int:
        """Cases of this call that failed, those of a process before this one included."""
        return sum(not r.get("ok", True) for r in self.results() if r.get("run") == self.run)

    def cases(self, cases: Iterable[Case]) -> None:
        """Tries each case; a failing one does not stop the next, nor does one that spoils the CUDA context.

        A case that may take longer than there is time, to judge by the slowest before it, is left out.
        """
        finished = self.finished()
        self.failed |= self.failures() > 0
        for name, measure in cases:
            if name in finished:
                continue
            if self.left() <= self.slowest:
                self._leave_out(name)
                continue
            begun = time.monotonic()
            self._try(name, measure)
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def _leave_out(self, name: str) -> None:
        self.left_out += 1
        print(f"left out: {name}", flush=True)

    def _try(self, name: str, measure: Callable[[], dict[str, Any] | None]) -> None:
        try:
            with self._until_the_deadline():
                values = measure() or {}
            ok = values.pop("ok", True)
            self.record(name, ok=ok, **values)
        except Skipped as reason:
            self.record(name, skipped=str(reason))
        except TimeIsUp:
            self._leave_out(name)
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                self.record(name, skipped=f"needs more memory: {str(error)[:200]}")
                return
            traceback.print_exc()
            self.record(name, ok=False, error=f"{type(error).__name__}: {str(error)[:500]}")
            self._go_on_in_a_new_context()

    @contextmanager
    def _until_the_deadline(self) -> Iterator[None]:
        """Raises `TimeIsUp` inside at the deadline, unless what runs then does not come back to Python."""

        def end(*_: Any) -> None:
            raise TimeIsUp

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _go_on_in_a_new_context(self) -> None:
        """After some errors every further call of the process fails: then this process begins again after the case."""
        if not self.cuda:
            return
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            print("the CUDA context is lost; going on in a new one", flush=True)
            self.begin_anew()

    def begin_anew(self) -> NoReturn:
        """This process starts the stage over, without the cases that it has tried and without a CUDA context."""
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "device", self.stage])

    def status(self) -> int:
        """How the stage ends."""
        if self.failed or self.left_out:
            return FAILED if self.failed else PARTLY
        tried = [r for r in self.results() if r.get("run") == self.run]
        return SKIPPED if tried and all("skipped" in r for r in tried) and not self.passed_before() else PASSED
