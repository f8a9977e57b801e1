"""Running a tool of the CUDA toolkit over `watched`, its output in a file of bounded size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .runner import ROOT
from .stage import Check, Skipped

MAX_FILE_BYTES = 7 * 2**20
_CUDA_HOME = "/usr/local/cuda"


def find(tool: str) -> str:
    """Where the tool is: on PATH, or in the toolkit."""
    home = os.environ.get("CUDA_HOME", _CUDA_HOME)
    places = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"])
    found = shutil.which(tool, path=places)
    if found is None:
        raise Skipped(f"{tool} is not installed")
    return found


def watched(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "device.watched", *map(str, arguments)]


def run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Exit status (None past the time) and output. What a killed tool leaves running ends with the stage."""
    print(" ".join(command), flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, errors="replace", stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 1.0))
        return process.returncode, output
    except subprocess.TimeoutExpired as expired:
        process.kill()
        taken = expired.output or b""
        return None, taken.decode(errors="replace") if isinstance(taken, bytes) else taken


def keep(path: Path, title: str, text: str) -> None:
    """Adds to a file, as far as there is room."""
    with path.open("a") as file:
        file.write(f"# {title}\n{text[: max(0, MAX_FILE_BYTES - file.tell())]}\n")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def rehearse(check: Check, *arguments: object) -> None:
    """Without a GPU: the program alone, then the reason why no tool watches it."""
    status, text = run(watched(*arguments), check.left())
    print(text, flush=True)
    if status != 0:
        raise RuntimeError(f"device.watched ended with {status}")
    raise Skipped("needs a CUDA device")
