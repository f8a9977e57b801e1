"""The tests of the CUDA kernels on the device, each outcome a line of its own.

A test that breaks the CUDA context makes those after it in the same worker fail too: of each worker the first failure
counts, and --maxfail ends the rest.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from enum import IntEnum

from ..runner import ROOT
from ..stage import Check, Skipped

WORKERS = 6
GPU_TESTS = ["-m", "gpu", "python_tests/gpu"]
# What a machine without a GPU runs in their place: anything small, through the same options and the same plugin.
TOY_TESTS = ["python_tests/test_divergence_options.py::test_ignored_rows_are_not_read"]


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class Status(IntEnum):
    """Exit statuses of pytest."""

    OK = 0
    INTERRUPTED = 2
    NO_TESTS = 5


def options(check: Check) -> list[str]:
    found = ["-q", "-p", "no:cacheprovider", "-p", "device.pytest_results", "--maxfail", "30"]
    found += [f"--junitxml={check.out / 'junit.xml'}"]
    if _has("xdist"):
        found += ["-n", str(WORKERS if check.cuda else 2)]
    if _has("pytest_timeout"):  # by a thread: a kernel that hangs lets no signal through
        found += ["--timeout", "90", "--timeout-method", "thread"]
    missing = [name for name in ("xdist", "pytest_timeout") if not _has(name)]
    if missing:
        print(
            f"without {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed", flush=True
        )
    return found


def pytest(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", *arguments]
    print(" ".join(command), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def run(check: Check) -> None:
    if not _has("pytest"):
        raise Skipped("pytest is not installed")
    if not check.cuda and pytest(["-qq", "-p", "no:cacheprovider", "--collect-only", *GPU_TESTS]) != 0:
        raise RuntimeError("the tests of the device cannot be collected")
    status = pytest([*options(check), *(GPU_TESTS if check.cuda else TOY_TESTS)])
    if check.failures() or status not in (Status.OK, Status.INTERRUPTED, Status.NO_TESTS):
        check.failed = True
    elif status == Status.INTERRUPTED:
        check.left_out += 1
    elif not check.results():  # none left to run is right, none at all is not
        raise RuntimeError("no test was collected")
