"""`~` and environment variables in every path that people write."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_world import run, settings_text, write_world

from distillm_ext.paths import expand_path
from distillm_ext.runs.settings import SettingsError, load_settings
from distillm_ext.teacher import CacheError, TeacherCache
from distillm_ext.training import DistillationConfig, load_rows


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("WORK", str(folder))
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def test_home_and_variables_are_replaced_once(home, monkeypatch):
    assert expand_path("~/a", "x") == expand_path("$WORK/a", "x") == expand_path("${WORK}/a", "x") == f"{home}/a"
    assert expand_path("owner/model", "x") == "owner/model"
    assert expand_path("runs/a~b", "x") == "runs/a~b"
    monkeypatch.setenv("ODD", "$WORK")
    assert expand_path("runs/$ODD", "x") == "runs/$WORK"  # what a variable holds is not expanded again


def test_a_file_with_a_dollar_sign_in_its_name_is_found(home):
    (home / "$NOWHERE.jsonl").touch()
    assert expand_path(home / "$NOWHERE.jsonl", "x") == f"{home}/$NOWHERE.jsonl"


@pytest.mark.parametrize("path", ["$NOWHERE/a", "a/${NOWHERE}", "~nobody-of-this-name/a", "~nobody-of-this-name"])
def test_what_cannot_be_replaced_is_an_error(home, path):
    with pytest.raises(ValueError, match="data: .*(NOWHERE.* is not set|home folder)"):
        expand_path(path, "data")


@pytest.mark.parametrize(
    "call",
    [
        lambda: load_rows("~/none.jsonl"),
        lambda: load_rows("${WORK}/none.jsonl"),
        lambda: TeacherCache.open("~/none"),
    ],
)
def test_readers_look_in_the_home_folder(home, call):
    with pytest.raises((FileNotFoundError, CacheError), match=str(home / "none")):
        call()


def test_configuration_expands_its_folders(home):
    args = DistillationConfig(output_dir="$WORK/out", lm_dataset=Path("~/text.jsonl"), use_cpu=True)
    assert args.output_dir == f"{home}/out" and args.lm_dataset == f"{home}/text.jsonl"
    with pytest.raises(ValueError, match="output_dir: the environment variable 'NOWHERE'"):
        DistillationConfig(output_dir="$NOWHERE/out", use_cpu=True)


def test_settings_and_overrides(home):
    (home / "run.yaml").write_text("student: {name: ~/s}\nteacher: $WORK/t\ndataset: {train: ~/a.jsonl}\n")
    found = load_settings(
        "~/run.yaml", ["teacher={name: ~/t, cache: ~/c}", "dataset.eval=${WORK}/b.jsonl", "training.output_dir=~/out"]
    )
    assert found.student == {"name": f"{home}/s"} and found.teacher == {"name": f"{home}/t", "cache": f"{home}/c"}
    assert found.dataset.train == f"{home}/a.jsonl" and found.dataset.eval == f"{home}/b.jsonl"
    assert found.output_dir == home / "out"
    (home / "bad.yaml").write_text("student: s\nteacher: $NOWHERE/t\ndataset: a.jsonl\n")
    with pytest.raises(SettingsError, match=r"teacher: .*NOWHERE.*bad\.yaml, line 2"):
        load_settings(home / "bad.yaml")


def test_commands_write_nothing_into_a_folder_called_tilde(home, tmp_path):
    write_world(home)
    (home / "run.yaml").write_text(
        settings_text(home, "unused").replace("output_dir: unused", "output_dir: ~/out").replace(str(home), "~")
    )
    run("train", "~/run.yaml", "training.max_steps=2")
    assert (home / "out/final/config.json").is_file() and (home / "out/checkpoint-2").is_dir()
    assert "resuming from" in run("train", "$WORK/run.yaml", "training.max_steps=2")
    run("capture", "--config=~/run.yaml", "--out=~/cache", "--rows=2")
    text = run(
        "evaluate", "~/out/final", "--dataset=~/eval.jsonl", "--generate=0", "--max-length=40", "--output=~/m.json"
    )
    assert (home / "cache/manifest.json").is_file() and (home / "m.json").is_file() and "response tokens" in text
    assert not list((tmp_path / "cwd").iterdir())
    run("capture", "--config=~/run.yaml", "--out=$NOWHERE/cache", code=2)
