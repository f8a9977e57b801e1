"""The runner of `benchmarks/device_check.py`, with stages of a line each: nothing stops it, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from device.plan import FAILED, NO_DEVICE, PARTLY, SKIPPED, Stage
from device_check_world import LONG, ROOT, Clock, books, cases, check, ending, gone, measuring, python, statuses


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    pids, there = tmp_path / "pids", tmp_path / "there"
    source = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep({LONG})'])\n"
        f"pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        f"pathlib.Path({str(there)!r}).touch()\n"
        f"time.sleep({LONG})"
    )
    Clock(there.exists, LONG).use(monkeypatch)
    assert check(tmp_path / "out", python("stuck", source, LONG), ending("next"), limit=3 * LONG) == 1
    assert statuses(tmp_path / "out") == {"stuck": "hung", "next": "passed"}
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_stage_leaves_nothing_running_when_it_ends_by_itself(tmp_path):
    pid = tmp_path / "pid"
    source = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep({LONG})'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))"
    )
    assert check(tmp_path / "out", python("leaving", source)) == 0
    assert gone(int(pid.read_text()))


@pytest.mark.parametrize(
    "status, word, expected",
    [
        (0, "passed", 0), (FAILED, "failed", 1), (PARTLY, "partly", 3), (SKIPPED, "skipped", 0), (7, "died (7)", 1),
    ],
)  # fmt: skip
def test_how_a_stage_ends_is_what_the_check_says(tmp_path, status, word, expected):
    assert check(tmp_path, ending("one", status), ending("two")) == expected
    assert statuses(tmp_path) == {"one": word, "two": "passed"}


def test_a_stage_that_dies_or_cannot_be_started_stops_nothing(tmp_path):
    killed = python("killed", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert check(tmp_path, killed, Stage("absent", LONG, ("/no/such/program",)), ending("next")) == 1
    assert statuses(tmp_path) == {"killed": "died (-11)", "absent": "failed", "next": "passed"}


def test_without_a_device_nothing_else_is_tried(tmp_path):
    assert check(tmp_path, ending("env", NO_DEVICE), ending("next")) == 2
    assert statuses(tmp_path) == {"env": "no device"}


def test_the_limit_of_the_whole_cuts_a_stage_and_leaves_the_rest_undone(tmp_path, monkeypatch):
    Clock(lambda: "b" in cases(tmp_path), 2 * LONG).use(monkeypatch)
    stages = measuring("quick", "a"), measuring("slow", "b", f"import time; time.sleep({LONG})"), ending("rest")
    assert check(tmp_path, *stages, limit=LONG / 2) == 3
    assert statuses(tmp_path) == {"quick": "passed", "slow": "cut", "rest": "not begun"}
    assert cases(tmp_path) == ["a", "b"]  # written before the kill
    assert (tmp_path / "timing.csv").read_text().splitlines()[1:] == ["quick,a,1.5,,", "slow,b,1.5,,"]


def test_a_failure_weighs_more_than_what_was_left_undone(tmp_path):
    assert check(tmp_path, ending("one", FAILED), ending("two", PARTLY)) == 1


def test_a_state_is_taken_up(tmp_path):
    """What passed is not run again, its results are carried along; what did not pass is."""
    first, second = tmp_path / "first", tmp_path / "second"
    base = ending("base", always=True)
    assert check(first, base, measuring("good", "a"), measuring("bad", "b", "raise SystemExit(1)")) == 1
    never = python("good", "raise SystemExit('ran again')")
    assert check(second, base, never, measuring("bad", "b2"), state=first / "state.json") == 0
    assert statuses(second) == {"base": "passed", "good": "passed", "bad": "passed"}
    assert cases(second) == ["a", "b", "b2"]
    assert json.loads((first / "state.json").read_text()) == json.loads((second / "state.json").read_text())
    assert "good: passed before" in (second / "log.txt").read_text()
    assert "base: passed before" not in (second / "log.txt").read_text()


@pytest.mark.parametrize("spoil", ["key", "torn", "absent", "of something else"])
def test_a_state_that_does_not_fit_is_not_taken_up(tmp_path, spoil):
    state = tmp_path / "state.json"
    assert check(tmp_path, measuring("good", "old")) == 0
    if spoil == "torn":
        state.write_text(state.read_text()[:40])
    elif spoil == "absent":
        state.unlink()
    elif spoil == "of something else":
        state.write_text("[]")
    key = "other key" if spoil == "key" else "key"
    assert check(tmp_path, measuring("good", "new"), state=state, key=key) == 0
    assert cases(tmp_path) == ["new"]
    assert "everything runs" in books.Book(tmp_path / "fresh", "third key", state).news


def test_results_later_than_the_state_are_taken_up_too(tmp_path):
    """A runner that was killed outright has not written its state since the last result."""
    check(tmp_path, measuring("one", "a"))
    books.append(tmp_path / "results.jsonl", {"stage": "two", "case": "late", "ms": 2.0})
    check(tmp_path, ending("one"), state=tmp_path / "state.json")
    assert cases(tmp_path) == ["a", "late"]


def test_the_key_is_of_sources_torch_and_device(tmp_path, monkeypatch):
    for folder in ("csrc", "distillm_ext"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "source").write_text("one")
    key = books.sources_key(tmp_path, "cuda")
    (tmp_path / "distillm_ext" / "_C.so").write_text("compiled")
    assert books.sources_key(tmp_path, "cuda") == key
    keys = {key, books.sources_key(tmp_path, "cpu")}
    for folder in ("csrc", "distillm_ext"):
        (tmp_path / folder / "source").write_text("two")
        keys.add(books.sources_key(tmp_path, "cuda"))
    (tmp_path / "csrc" / "source").rename(tmp_path / "csrc" / "renamed")
    keys.add(books.sources_key(tmp_path, "cuda"))
    monkeypatch.setattr(books.importlib.metadata, "version", lambda _: "2.0")
    keys.add(books.sources_key(tmp_path, "cuda"))
    assert len(keys) == 6


def test_a_torn_line_costs_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"case": "a"}\n{"case": "to')
    books.append(path, {"case": "b"})
    assert [result["case"] for result in books.read(path)] == ["a", "b"]


def test_sigterm_writes_everything_and_ends_the_stage(tmp_path):
    """The whole program, ended from outside while a stage runs."""
    pid = tmp_path / "pid"
    then = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep({LONG})"
    source = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'benchmarks'), str(ROOT / 'python_tests')]!r}\n"
        "from pathlib import Path\nimport device_check_world as t\n"
        f"sys.exit(t.check(Path({str(tmp_path / 'out')!r}), t.measuring('running', 'a', {then!r}), t.ending('rest')))"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=LONG)[0].decode()
    assert process.returncode == 3 and "ended by signal 15" in output
    assert gone(int(pid.read_text()))
    assert cases(tmp_path / "out") == ["a"] and "running,a,1.5" in (tmp_path / "out" / "timing.csv").read_text()
    assert statuses(tmp_path / "out") == {"running": "cut"}


def test_at_most_eight_files_come_back_and_the_log_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(books, "MAX_LOG_BYTES", 1000)
    (tmp_path / "junit.xml").write_text("of an earlier check")
    check(tmp_path, python("loud", "print('x' * 5000)"))
    assert {path.name for path in tmp_path.iterdir()} <= set(books.FILES) - {"junit.xml"} and len(books.FILES) == 8
    assert (tmp_path / "log.txt").stat().st_size == 1000
