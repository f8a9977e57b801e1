"""Our kernels under compute-sanitizer: accesses out of bounds, races in shared memory, barriers that do not meet."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from .. import tools
from ..stage import Check, Skipped

TOOLS = ("memcheck", "racecheck", "synccheck")
# For the cases, and for torch and the device to begin under the tool.
CASE_SECONDS, STARTUP_SECONDS = 14, 16
_FOUND = 99
_OURS = "kns=distillm"  # part of the mangled name of every kernel: its namespace
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*")
_REFUSED = re.compile(r"Device not supported|Unable to find injection|LibraryNotLoaded")


def checked(check: Check, tool: str) -> dict[str, Any]:
    command = [tools.find("compute-sanitizer"), "--tool", tool, "--kernel-name", _OURS]
    command += ["--error-exitcode", str(_FOUND), "--print-limit", "50"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks for what a card may not have
    command += tools.watched("every", CASE_SECONDS)
    limit = min(CASE_SECONDS + STARTUP_SECONDS, check.left() - 1)
    status, text = tools.run(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    tools.keep(check.out / "sanitizer.txt", f"{tool}, exit status {status}", text)
    summary, cases = _SUMMARY.search(text), re.search(r"watched (\d+) of (\d+) cases", text)
    if _REFUSED.search(text):
        raise Skipped(f"{tool} does not work on this machine: {tools.last_line(text)}")
    return {
        "ok": status == 0 and cases is not None,
        "summary": summary[0].strip("= ") if summary else tools.last_line(text),
        "cases": cases[0] if cases else "not finished",
    }


def run(check: Check) -> None:
    if not check.cuda:
        tools.rehearse(check, "every", 10)
    tools.find("compute-sanitizer")
    check.cases((tool, partial(checked, check, tool)) for tool in TOOLS)
