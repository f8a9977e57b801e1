"""The stages of `benchmarks/device_check.py`: their cases, and what they make of machine, libraries and tools."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from device import stage as stages_
from device.plan import FAILED, PARTLY, PASSED, SKIPPED, STAGES
from device.stages import env, libs, ncu, sanitizer
from device_check_world import LONG, ROOT, Clock, books, cases, check, ending, python, runners


def test_cases_are_tried_by_themselves_and_once(tmp_path):
    """One that raises is noted and the next tried; what went well in an earlier call is not measured again."""
    cases_of = (
        "from device.stage import Check, Skipped\n"
        "def good(): return {'ms': 1.0}\n"
        "def wrong(): return {'ok': False}\n"
        "def bad(): raise ValueError('no')\n"
        "def absent(): raise Skipped('no liger')\n"
        "check = Check.from_environment()\n"
        "check.cases([('good', good), ('wrong', wrong), ('bad', bad), ('absent', absent), ('last', good)])\n"
        "raise SystemExit(check.status())"
    )
    assert check(tmp_path, python("stage", cases_of)) == 1
    assert cases(tmp_path) == ["good", "wrong", "bad", "absent", "last"]
    assert check(tmp_path, python("stage", cases_of), state=tmp_path / "state.json") == 1
    assert cases(tmp_path)[5:] == ["wrong", "bad", "absent"]


def test_a_stage_all_of_whose_cases_lack_something_is_skipped(tmp_path):
    def absent():
        raise stages_.Skipped("no counters")

    given = stages_.Check("stage", tmp_path, "cpu", deadline=time.monotonic() + LONG, run="1")
    given.cases([("one", absent), ("two", absent)])
    assert given.status() == SKIPPED
    given.cases([("three", dict)])
    assert given.status() == PASSED


def test_a_stage_stops_by_itself_before_it_would_be_killed(tmp_path, monkeypatch):
    """A case that would take as long as the slowest before it, and longer than there is time, is left out."""
    clock = Clock(lambda: True, 0.0)
    clock.monotonic = lambda: clock.leap
    monkeypatch.setattr(stages_, "time", clock)

    def ten_seconds():
        clock.leap += 10

    given = stages_.Check("stage", tmp_path, "cpu", deadline=35.0, run="1")
    given.cases((str(i), ten_seconds) for i in range(6))
    assert cases(tmp_path) == ["0", "1", "2"] and given.left_out == 3 and given.status() == PARTLY
    runner = runners.Runner([], books.Book(tmp_path / "out", "key"), LONG, "cpu")
    told = runner.environment(ending("stage"), limit=LONG)
    assert float(told["DEVICE_CHECK_DEADLINE"]) < time.monotonic() + LONG - 1


def test_a_case_that_runs_into_the_deadline_is_left_out(tmp_path):
    def slow():
        try:
            time.sleep(LONG)
        except Exception:
            return {"ms": 1.0}

    given = stages_.Check("stage", tmp_path, "cpu", deadline=time.monotonic() + 0.1, run="1")
    given.cases([("slow", slow), ("next", dict)])
    assert cases(tmp_path) == [] and given.left_out == 2 and given.status() == PARTLY


def test_a_case_that_spoils_the_context_costs_no_other(tmp_path, monkeypatch):
    """The stage begins anew as the same process, without the cases it has tried; the failure is not forgotten."""

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Anew(BaseException):
        pass

    def begin(*_):
        raise Anew

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(synchronize=lost)))
    monkeypatch.setattr(stages_.os, "execv", begin)
    tried = [("good", dict), ("bad", lost), ("next", dict)]
    with pytest.raises(Anew):
        stages_.Check("stage", tmp_path, "cuda", deadline=time.monotonic() + LONG, run="1").cases(tried)
    again = stages_.Check("stage", tmp_path, "cuda", deadline=time.monotonic() + LONG, run="1")
    again.cases(tried)
    assert cases(tmp_path) == ["good", "bad", "next"] and again.status() == FAILED


@pytest.mark.parametrize(
    "compiled, card, runs",
    [
        ("9.0", "9.0", True), ("9.0a", "9.0", True), ("8.0", "8.9", True), ("8.9", "8.0", False), ("8.0", "9.0", False),
        ("8.0 12.0+PTX", "9.0", False), ("8.0+PTX", "9.0", True), ("8.0 9.0", "9.0", True),
    ],
)  # fmt: skip
def test_libraries_that_are_not_for_this_card_are_built(compiled, card, runs):
    facts = {"cuda_loaded": True, "cuda_reason": "", "cuda_archs": compiled, "capability": card}
    assert (libs.problem_of(facts, cuda=True) == "") == runs
    assert libs.problem_of({**facts, "cuda_loaded": False, "cuda_reason": "no nvcc"}, cuda=True) == "no nvcc"
    assert libs.problem_of({"error": "no _C"}, cuda=False) == "no _C"


CLEAN = "========= ERROR SUMMARY: 0 errors\nwatched 9 of 198 cases\n"
HAZARD = "watched 198 of 198 cases\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
COUNTERS = (
    '==PROF== Connected to process 7\n"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
    '"0","divergence_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","41.5"\n'
)


@pytest.mark.parametrize(
    "stage, status, text, ok, told",
    [
        (sanitizer, 0, CLEAN, True, "0 errors"), (sanitizer, 99, HAZARD, False, "1 hazard"),
        (sanitizer, None, "", False, "not finished"), (sanitizer, 0, "no summary", False, "not finished"),
        (sanitizer, 1, "========= Error: Device not supported", True, "skipped"),
        (ncu, 0, COUNTERS, True, "41.5 %"), (ncu, 1, "==ERROR== LibraryNotLoaded", True, "LibraryNotLoaded"),
    ],
)  # fmt: skip
def test_what_the_tools_say(tmp_path, monkeypatch, stage, status, text, ok, told):
    """A tool that this machine refuses is left out by name; one that finds something, or does not finish, fails."""
    commands = []
    monkeypatch.setattr(stage.tools, "find", lambda name: name)
    monkeypatch.setattr(stage.tools, "run", lambda command, *_, **__: commands.append(command) or (status, text))
    given = stages_.Check("tools", tmp_path, "cuda", deadline=time.monotonic() + LONG, run="1")
    monkeypatch.setattr(given, "_go_on_in_a_new_context", lambda: None)
    stage.run(given)
    results = list(books.read(tmp_path / "results.jsonl"))
    assert len(results) == len(commands) == 3
    assert all(result["ok"] is ok and told in json.dumps(result) for result in results)
    (kept,) = (path for path in tmp_path.iterdir() if path.name != "results.jsonl")
    assert kept.name in books.FILES and text in kept.read_text()


def test_the_command(tmp_path):
    """Wrong usage is not "no GPU"; the stages are those of the documentation."""
    command = [sys.executable, str(ROOT / "benchmarks" / "device_check.py"), "--out", str(tmp_path)]
    wrong = subprocess.run([*command, "--stages", "smok"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 64 and "smoke" in wrong.stderr
    text = (ROOT / "docs" / "device_check.md").read_text()
    assert all(f"| `{stage.name}` |" in text for stage in STAGES)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_machine_without_a_gpu(tmp_path, monkeypatch, device):
    """Ends the check of a device, not its rehearsal; what the machine is stands in env.json either way."""
    monkeypatch.setattr(env, "_card", lambda: {"torch": "2.0"})
    given = stages_.Check("env", tmp_path, device, deadline=time.monotonic() + LONG, run="1")
    if device == "cuda":
        with pytest.raises(stages_.NoDevice, match="is_available"):
            env.run(given)
    else:
        env.run(given)
        assert given.status() == PASSED
    assert json.loads((tmp_path / "env.json").read_text())["torch"] == "2.0"


def test_a_time_is_the_median_of_calls_in_turns(monkeypatch):
    """Three that do not count, then twenty, one set of inputs after the other; as many sets as the cache asks for."""
    from device import clock

    now, called = SimpleNamespace(seconds=0.0), []

    def call(i):
        called.append(i)
        now.seconds += 9.0 if len(called) <= clock.WARM_UPS else 0.001 * (1 + i)

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    ms, how = clock.milliseconds([lambda i=i: call(i) for i in range(3)], "cpu")
    assert called == [0, 1, 2] + [i % 3 for i in range(20)] and how == "host clock"
    assert ms == pytest.approx(2.0)
    card = SimpleNamespace(L2_cache_size=100 * 10**6)
    monkeypatch.setattr(clock.torch.cuda, "get_device_properties", lambda _: card)
    assert [clock.input_sets(size, "cuda") for size in (10**6, 3 * 10**8, 10**9)] == [400, 2, 1]


def test_tests_are_noted_one_by_one_and_taken_up(tmp_path):
    """pytest stops in order when its time is up, with its report written; the next call runs what has not passed."""
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_first(): pass\n"
        "def test_second(): assert 1 + 1 == 3\n"
        "@pytest.mark.skip(reason='too small')\n"
        "def test_third(): pass\n"
    )
    runner = runners.Runner([], books.Book(tmp_path / "out", "key"), LONG, "cpu")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "device.pytest_results", "--junitxml=junit.xml"]
    statuses = []
    for call, limit in (("one", -1.0), ("two", LONG)):
        told = runner.environment(ending("tests"), limit)
        told |= {"DEVICE_CHECK_RUN": call, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        statuses.append(subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, check=False).returncode)
        assert "test_first" in (tmp_path / "junit.xml").read_text() or call == "two"
    assert statuses == [2, 1]
    results = [(r["run"], r["case"].split("::")[1], r["ok"]) for r in books.read(tmp_path / "out" / "results.jsonl")]
    assert results == [("one", "test_first", True), ("two", "test_second", False), ("two", "test_third", True)]
    last = list(books.read(tmp_path / "out" / "results.jsonl"))
    assert "1 + 1" in last[1]["error"] and "too small" in last[2]["skipped"]
