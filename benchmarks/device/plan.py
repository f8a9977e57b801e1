"""The stages of a check of the device, in their order."""

from __future__ import annotations

import sys
from dataclasses import dataclass

# How a stage ends; 0 and 1 as everywhere. NO_DEVICE ends the whole check: nothing after it could run.
PASSED, FAILED, NO_DEVICE, PARTLY, SKIPPED = range(5)


@dataclass(frozen=True)
class Stage:
    """A command with a limit in seconds.

    The command finds what it has to know in its environment (`runner.environment`) and ends with one of the statuses
    above. PARTLY: cases were left out for want of time; a later call takes them up. SKIPPED: something that the stage
    needs is not on this machine; its last line of output says what.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    always: bool = False  # what the others stand on: part of every call, whatever was asked for or done before


def _stage(name: str, limit: float, always: bool = False) -> Stage:
    return Stage(name, limit, (sys.executable, "-m", "device", name), always)


STAGES = (
    _stage("env", 30, always=True),
    _stage("libs", 150, always=True),
    _stage("smoke", 35),
    _stage("copy", 15),
    _stage("tests", 110),
    _stage("timing", 80),
    _stage("eager", 25),
    _stage("compile", 80),
    _stage("linear", 40),
    _stage("sanitizer", 100),
    _stage("ncu", 90),
)
