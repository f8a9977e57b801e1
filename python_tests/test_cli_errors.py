"""How a command ends with an error: one sentence about what the user gave, and the way to the traceback of others."""

from __future__ import annotations

import json

import pytest
import typer
from cli_world import run

from distillm_ext.cli.errors import friendly_errors
from distillm_ext.data.rows.checks import RowError
from distillm_ext.demo.assets import AssetError
from distillm_ext.runs.settings import SettingsError
from distillm_ext.teacher import CacheMismatch, CacheMiss

HINT = "DISTILLM_TRACEBACK=1"
OWN = [SettingsError("policy: unknown"), RowError("line 3"), CacheMismatch("made for another"), CacheMiss("no row"),
       AssetError("no connection")]  # fmt: skip
OTHERS = [ValueError("could not convert"), TypeError("unsupported operand"), FileNotFoundError("nowhere"),
          json.JSONDecodeError("Expecting value", "x", 0)]  # fmt: skip
DEFECTS = [RuntimeError("shapes"), KeyError("name"), AttributeError("no attribute"), AssertionError()]


def name_of(error: Exception) -> str:
    return type(error).__name__


def message(error: Exception, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of stderr of a command that fails with this error."""
    with pytest.raises(typer.Exit) as ended, friendly_errors():
        raise error
    assert ended.value.exit_code == 2 and ended.value.__cause__ is error
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("error", OWN, ids=name_of)
def test_an_error_of_the_projects_own_is_its_message_alone(error, capsys):
    assert message(error, capsys) == [f"error: {error}"]


@pytest.mark.parametrize("error", OTHERS, ids=name_of)
def test_any_other_names_the_way_to_its_traceback(error, capsys):
    first, second = message(error, capsys)
    assert first == f"error: {error}"
    assert name_of(error) in second and HINT in second


@pytest.mark.parametrize("error", DEFECTS, ids=name_of)
def test_what_no_input_raises_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised, friendly_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", [*OWN, *OTHERS], ids=name_of)
def test_every_error_keeps_its_traceback_when_asked(error, monkeypatch):
    monkeypatch.setenv("DISTILLM_TRACEBACK", "1")
    with pytest.raises(type(error)) as raised, friendly_errors():
        raise error
    assert raised.value is error


def test_a_command_says_so_and_so_does_the_help(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    output = run("evaluate", tmp_path / "nowhere", "--dataset", tmp_path / "rows.jsonl", code=2)
    assert "no model folder" in output and HINT in output
    (tmp_path / "run.yaml").write_text("teachr: x")
    assert HINT not in run("train", tmp_path / "run.yaml", code=2)
    assert HINT in run("--help")
