"""The command line: training, interruption and resumption, evaluation, info, help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_world import ROOT, run, settings_text, write_settings, write_world
from safetensors.torch import load_file
from tiers import full
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_ext.runs.settings import load_settings
from distillm_ext.training import run as run_module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def config(world, tmp_path):
    return write_settings(world, tmp_path)


# ---- train


def test_train_writes_a_model_a_log_and_a_plot(config, tmp_path):
    output = run("train", config, "training.max_steps=4", "--set", "training.learning_rate=2e-3")
    folder = tmp_path / "out"
    student = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert student.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(folder / "final").eos_token == "<eos>"
    log = json.loads((folder / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert log[-1]["step"] == 4 and any("eval_divergence" in entry for entry in log)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert load_settings(folder / "settings.yaml").training["learning_rate"] == 2e-3
    assert "student saved to" in output and "step 4/4: loss" in output


def test_a_run_that_meets_nan_ends_with_the_row_and_saves_nothing(world, config, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(world / "teacher")
    teacher.model.norm.weight.data[0] = float("nan")
    teacher.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path / "broken")
    changed = (f"student={world / 'teacher'}", f"teacher={tmp_path / 'broken'}", "training.policy=dataset")
    output = run("train", config, *changed, code=1)
    assert "step 1: NaN or inf in gradient, loss, teacher" in output and "train.jsonl, line" in output
    assert not (tmp_path / "out" / "final").exists()
    assert [path.name for path in (tmp_path / "out").glob("nan-step-*.json")] == ["nan-step-1.json"]


def test_named_student_trains_with_its_own_tokenizer(world, config, tmp_path):
    run("train", config, f"student={world / 'teacher'}", "training.max_steps=1")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_stps=3", "did you mean 'max_steps'"),
        ("dataset.train=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("teacher=./nowhere", "no model folder"),
        ("student.keep_layers=9", "keep_layers must be an integer in 1..3"),
        ("dataset.eval=null", "dataset.eval is not set"),
    ],
)
def test_errors_of_the_user_are_one_sentence(config, override, message):
    output = run("train", config, override, code=2)
    assert message in output and "Traceback" not in output


def test_missing_file_is_an_error():
    assert "no such settings file" in run("train", "nowhere.yaml", code=2)


def test_bad_row_is_reported_with_file_and_line(world, config, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((world / "train.jsonl").read_text() + '\n{"prompt": "x"}\n')
    assert "bad.jsonl, line 33: column 'completion' is missing" in run("train", config, f"dataset.train={bad}", code=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "distillm_ext.cli.main", "train", str(config), *arguments]


def start(config: Path, tmp_path: Path, **training) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(config), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "the run did not get that far"
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGINT, *full(signal.SIGKILL)])
def test_stopped_run_resumes_to_the_same_weights(world, tmp_path, sent):
    # Long enough that the signal arrives in mid-run; checkpoints every 2 steps.
    config = tmp_path / "run.yaml"
    config.write_text(settings_text(world, tmp_path / "out", max_steps=40, save_total_limit=2, logging_steps=5))
    process = start(config, tmp_path)
    wait_for(lambda: (tmp_path / "out" / "checkpoint-6").is_dir(), process)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=120)
    assert not (tmp_path / "out" / "final").exists()
    if sent == signal.SIGINT:
        assert process.returncode == 130, output
        assert f"distillm train {config} --resume" in output and "Traceback" not in output
    again = run("train", config)
    assert "resuming from" in again
    run("train", config, f"training.output_dir={tmp_path / 'whole'}")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_interrupt_saves_the_step_it_finishes(config, tmp_path, monkeypatch):
    from distillm_ext.runs.progress import ProgressBar

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ProgressBar, "on_step_end", interrupt)
    output = run("train", config, "training.save_steps=100", code=130)
    assert "stopped. Go on with" in output
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGINT) is before


def test_start_anew_moves_earlier_checkpoints_aside(config, tmp_path):
    run("train", config, "training.max_steps=2")
    output = run("train", config, "training.max_steps=2", "--no-resume")
    assert "resuming" not in output
    assert (tmp_path / "out" / "earlier-1" / "checkpoint-2").is_dir()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_resuming_with_other_settings_says_which(config):
    run("train", config, "training.max_steps=2")
    output = run("train", config, "training.max_steps=3", "training.learning_rate=3e-3")
    assert "settings changed since that checkpoint: training.learning_rate, training.max_steps" in output


# ---- evaluate, info, help


def test_evaluate_prints_a_table_and_writes_json(world, tmp_path):
    output = run(
        "evaluate", world / "teacher", "--teacher", world / "teacher", "--dataset", world / "eval.jsonl",
        "--split", "train[:10]", "--generate", "4", "--max-new-tokens", "4", "--max-prompt-length", "24",
        "--max-length", "40", "--output", tmp_path / "deep" / "metrics.json",
    )  # fmt: skip
    assert "cross-entropy" in output and "10 rows" in output
    found = json.loads((tmp_path / "deep" / "metrics.json").read_text())
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["agreement"] == 1.0
    assert found["rows"] == 10 and found["generated_rows"] == 4 and found["cross_entropy"] > 1


def test_evaluate_without_a_teacher(world, tmp_path):
    path = tmp_path / "m.json"
    run("evaluate", world / "teacher", "--dataset", world / "eval.jsonl", "--generate", "0", "--rows", "3",
        "--output", path)  # fmt: skip
    found = json.loads(path.read_text())
    assert found["kl"] is None and found["rouge_l"] is None and found["rows"] == 3


@pytest.mark.parametrize(("broken", "lost"), [("model", ["kl", "cross_entropy"]), ("teacher", ["kl"])])
def test_evaluate_of_a_broken_model_shows_it_and_fails(world, tmp_path, broken, lost):
    model = AutoModelForCausalLM.from_pretrained(world / "teacher")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(world / "teacher").save_pretrained(tmp_path / "broken")
    sides = {"model": world / "teacher", "teacher": world / "teacher", broken: tmp_path / "broken"}
    output = run(
        "evaluate", sides["model"], "--teacher", sides["teacher"], "--dataset", world / "eval.jsonl", "--generate", "0",
        "--rows", "3", "--output", tmp_path / "m.json", code=1,
    )  # fmt: skip
    assert output.count("nan") == len(lost) and f"error: {', '.join(lost)}: NaN or inf" in output
    found = json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)
    assert found["not_finite"] == lost and found["kl"] is None


def test_a_run_whose_validation_is_nan_ends_with_the_row(world, config, tmp_path, monkeypatch):
    """The loss of one row, by its number, is NaN in the evaluation alone."""
    sums = run_module.row_sums

    def broken(student, teacher, targets, rows, num_rows, *rest):
        found = sums(student, teacher, targets, rows, num_rows, *rest)
        found[0, 0] = float("nan")
        return found

    monkeypatch.setattr(run_module, "row_sums", broken)
    output = run("train", config, code=1)
    assert "error: step 3: NaN or inf in eval_loss" in output and "eval.jsonl, line 1: loss" in output
    assert "Traceback" not in output and not (tmp_path / "out" / "final").exists()


def test_evaluate_reports_a_missing_model(world):
    assert "no model folder" in run("evaluate", "./nowhere", "--dataset", world / "eval.jsonl", code=2)


def python(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_info_shows_what_bug_reports_need():
    output = run("info")
    for part in ("distillm_ext", "torch", "transformers", "python", "CPU instruction set", "CUDA architectures",
                 "CUDA kernels"):  # fmt: skip
        assert part in output, part
    assert run("--version")


def test_module_prints_the_same_with_torch_and_numpy_alone():
    blocked = ("typer", "rich", "transformers", "datasets", "yaml", "click", "accelerate")
    code = (
        f"import sys, runpy\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "runpy.run_module('distillm_ext', run_name='__main__')"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert " ".join(result.stdout.split()) == run("info")


def test_help_imports_nothing_heavy():
    result = python(
        "import sys\nfrom typer.testing import CliRunner\nfrom distillm_ext.cli.main import app\n"
        "out = [CliRunner().invoke(app, [*c, '--help']) for c in ([], ['train'], ['evaluate'], ['demo'], ['info'])]\n"
        "assert all(r.exit_code == 0 for r in out), out\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib', 'accelerate') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr
