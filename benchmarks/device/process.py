"""One command as a process group with a limit: its output handed on as it comes, nothing of it left running."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL_SECONDS = 0.05
_DRAIN_SECONDS = 1.0
_REAP_SECONDS = 5.0
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def _own_group() -> None:
    """A group, not a session: whoever ends everything of this session must reach a stage too."""
    os.setpgid(0, 0)
    if sys.platform == "linux":  # a runner that is killed outright takes the stage along
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _ended(pid: int) -> bool:
    """Whether the process has exited, without reaping it: its number stays taken while its group is ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_group(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nothing left of it; macOS forbids signals to what is not reaped
        pass
    try:
        child.wait(timeout=_REAP_SECONDS)
    except subprocess.TimeoutExpired:  # stuck in the driver: the next stage must not wait for it
        print(f"process {child.pid} does not end; it is left behind", flush=True)


def _hand_on(source: int, sink: Callable[[bytes], None], seconds: float) -> bool:
    """Waits for output up to `seconds` and hands it on; False at the end of the output."""
    readable, _, _ = select.select([source], [], [], seconds)
    data = os.read(source, 1 << 16) if readable else None
    if data:
        sink(data)
    return data != b""


def run(
    command: Sequence[str],
    limit: float,
    *,
    folder: Path,
    environment: Mapping[str, str],
    sink: Callable[[bytes], None],
    tick: Callable[[], None],
) -> int | None:
    """Runs a command for at most `limit` seconds, then kills it and what it started.

    `sink` gets stdout and stderr as they come. `tick` is called several times a second; what it raises ends the command
    and is passed on. Returns the exit status (negative: the signal that ended it), None where the limit did.
    """
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
        env=dict(environment), preexec_fn=_own_group,
    )  # fmt: skip
    assert child.stdout is not None
    source, end, reading, late = child.stdout.fileno(), time.monotonic() + limit, True, False
    try:
        while not (_ended(child.pid) or late):
            tick()
            if reading:
                reading = _hand_on(source, sink, _POLL_SECONDS)
            else:
                time.sleep(_POLL_SECONDS)
            late = time.monotonic() >= end and not _ended(child.pid)
    finally:
        _end_group(child)
        drained = time.monotonic() + _DRAIN_SECONDS  # a process that left the group may hold the pipe for ever
        while reading and time.monotonic() < drained:
            reading = _hand_on(source, sink, _POLL_SECONDS)
        child.stdout.close()
    return None if late else child.returncode
