"""What a check has found so far, on disk at every moment: results.jsonl, timing.csv, state.json, log.txt."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distillm_ext.files import write_text

Result = dict[str, Any]
# At most eight, each below 16 MiB: what a machine hands back may be limited to that.
FILES = (
    "env.json", "log.txt", "results.jsonl", "timing.csv", "junit.xml", "sanitizer.txt", "ncu.csv", "state.json",
)  # fmt: skip
MAX_LOG_BYTES = 15 * 2**20
_COLUMNS = ("stage", "case", "ms", "TB/s", "share of copy")
_NOT_IN_THE_TABLE = ("run", "ok")


def sources_key(root: Path, device: str) -> str:
    """Hash of everything in csrc/ and distillm_ext/ but what is compiled, of torch's version and the kind of device."""
    digest = hashlib.sha256(f"{importlib.metadata.version('torch')} {device}".encode())
    for folder in ("csrc", "distillm_ext"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                digest.update(f"\0{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:16]


def append(path: Path, result: Result) -> None:
    """One JSON line, on the disk when this returns; a line torn by a kill before is closed first."""
    with path.open("ab+") as file:
        torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Iterator[Result]:
    """The lines that are whole."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            continue


def table(results: Iterable[Result]) -> str:
    """CSV of everything that has a time; of a case measured twice, the later."""
    latest = {(r.get("stage"), r.get("case")): r for r in results if "ms" in r}
    names = dict.fromkeys([*_COLUMNS, *(name for r in latest.values() for name in r)])
    columns = [name for name in names if name not in _NOT_IN_THE_TABLE]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(latest.values())
    return text.getvalue()


class Log:
    """Everything that is printed, in a file too, up to a size."""

    def __init__(self, path: Path) -> None:
        self.file, self.room = path.open("ab"), MAX_LOG_BYTES

    def __call__(self, data: bytes) -> None:
        if self.room > 0:
            self.file.write(data[: self.room])
            self.file.flush()
        self.room -= len(data)
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except (BrokenPipeError, ValueError):  # nobody listens any more; the file has it
            pass

    def line(self, text: str) -> None:
        self((text + "\n").encode())


class Book:
    """Stages and results of a check in the folder `out`.

    A state found at `state` is taken up where its key is this one's; else the check begins anew. Either way the files
    of an earlier check in `out` are replaced.
    """

    def __init__(self, out: Path, key: str, state: Path | None = None) -> None:
        self.out, self.key, self.state = out, key, state
        self.stages: dict[str, dict[str, Any]] = {}
        found, self.news = self._earlier()
        results = found.get("results", [])
        if found and state is not None:  # what was measured after the state was last written
            results += [r for r in read(state.parent / "results.jsonl") if r not in results]
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        self.stages = found.get("stages", {})
        write_text(self.results_path, "".join(json.dumps(r) + "\n" for r in results))
        self.log = Log(out / "log.txt")
        self.save()

    @property
    def results_path(self) -> Path:
        return self.out / "results.jsonl"

    def _earlier(self) -> tuple[dict[str, Any], str]:
        """The state to take up, or {}, and a sentence on it."""
        if self.state is None:
            return {}, "no --state: everything runs"
        try:
            found = json.loads(self.state.read_text())
            key = found["key"]
        except FileNotFoundError:
            return {}, f"{self.state} is not there yet: everything runs"
        except (json.JSONDecodeError, KeyError, TypeError):
            return {}, f"{self.state} is not a state of this check: everything runs"
        if key != self.key:
            return {}, f"sources, torch or the kind of device changed since {self.state}: everything runs"
        return found, f"taken up from {self.state}"

    def passed(self, stage: str) -> bool:
        return self.stages.get(stage, {}).get("status") == "passed"

    def save(self) -> None:
        """Writes timing.csv and state.json anew, and the caller's own copy of the state where that is possible."""
        results = list(read(self.results_path))
        write_text(self.out / "timing.csv", table(results))
        text = json.dumps({"key": self.key, "stages": self.stages, "results": results}, indent=1)
        write_text(self.out / "state.json", text)
        if self.state is not None and self.state.resolve() != (self.out / "state.json").resolve():
            try:
                write_text(self.state, text)
            except OSError as error:
                self.log.line(f"{self.state} cannot be written ({error.strerror}); the state is in {self.out}")
                self.state = None
