"""The command line: settings from YAML and overrides, training, interruption and resumption, evaluation, info."""

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
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from distillm_ext.cli.main import app
from distillm_ext.demo.tiny import make_tokenizer, write_rows
from distillm_ext.training.coercion import CoercionError, coerce
from distillm_ext.training.settings import SettingsError, load_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny untrained teacher, rows, and a settings file."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    rows = write_rows(48, seed=0)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:32]))
    (folder / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in rows[32:]))
    return folder


def settings_text(world: Path, output: Path, **training) -> str:
    values = {
        "student": {"keep_layers": 2},
        "teacher": str(world / "teacher"),
        "dataset": {"train": str(world / "train.jsonl"), "eval": str(world / "eval.jsonl")},
        "training": {
            "output_dir": str(output), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
            "policy": "adaptive_off_policy", "sgo_initial": 0.7, "max_prompt_length": 24, "max_length": 40,
            "max_new_tokens": 4, "replay_capacity": 16, "eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1,
            "save_steps": 2, "report_to": "none", "use_cpu": True, "seed": 3, **training,
        },
    }  # fmt: skip
    return yaml.safe_dump(values)


@pytest.fixture
def config(world, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(settings_text(world, tmp_path / "out"))
    return path


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


# ---- settings


def test_every_kind_of_value(config):
    settings = load_settings(
        config,
        ["training.learning_rate=1e-4", "training.max_steps=1e2", "training.bf16=true", "training.run_name=1e5",
         "training.eval_strategy=no", "training.alpha=null", "training.sampling.top_k=5", "student.layers=[0, 2]",
         "training.lr_scheduler_kwargs={num_cycles: 2}", "training.save_steps=4", "training.report_to=[none]"],
    )  # fmt: skip
    training = settings.training
    assert training["learning_rate"] == 1e-4 and training["max_steps"] == 100 and training["bf16"] is True
    assert training["run_name"] == "1e5" and training["eval_strategy"] == "no" and training["alpha"] is None
    assert training["sampling"] == {"top_k": 5} and training["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert settings.student == {"keep_layers": 2, "layers": [0, 2]}
    assert isinstance(training["max_steps"], int) and training["report_to"] == ["none"]


def test_number_in_exponent_form_in_the_file_is_a_number(world, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(settings_text(world, tmp_path).replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert load_settings(path).training["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainin.max_steps=3", "unknown key 'trainin'.*did you mean 'training'"),
        ("training.learning_rat=3", "unknown key 'training.learning_rat'.*did you mean 'learning_rate'"),
        ("training.sampling.temprature=1", "training.sampling.temprature.*did you mean 'temperature'"),
        ("student.keep_layer=3", "did you mean 'keep_layers'"),
        ("teacher.nam=x", "did you mean 'name'"),
        ("dataset.evla=x", "did you mean 'eval'"),
        ("training.max_steps=1.5", "training.max_steps: expected an integer, got 1.5"),
        ("training.max_steps=true", "expected an integer"),
        ("training.learning_rate=fast", "expected a number, got 'fast'"),
        ("training.bf16=maybe", "expected true or false"),
        ("training.policy=[a]", "expected text"),
        ("dataset.columns=x", "expected a mapping"),
        ("student=3", "student: expected a hub name"),
        ("teacher=", "teacher: expected a hub name"),
        ("training=3", "training: expected a mapping"),
        ("nonsense", "expected KEY=VALUE"),
        (".x=3", "expected KEY=VALUE"),
        ("training.max_steps={", "not valid YAML"),
    ],
)
def test_bad_override_names_key_and_override(config, override, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(config, [override])
    assert "override" in str(caught.value)


def test_bad_key_in_the_file_is_reported_with_its_line(world, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("student: a\nteacher: b\ndataset: c.jsonl\ntraining:\n  max_steps: 3\n  polcy: dataset\n")
    with pytest.raises(SettingsError, match=r"'training.polcy' \(.*bad.yaml, line 6\): did you mean 'policy'"):
        load_settings(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("student: a\nstudent: b\n", "'student' is given twice"),
        ("- a\n", "expected a mapping"),
        ("student: [a\n", "not valid YAML"),
        ("student: a\nteacher: b\n", "the key 'dataset' is missing"),
        ("", "the key 'student' is missing"),
        ("student: a\nteacher: b\ndataset: {eval: x}\n", "dataset.train is missing"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(path)


def test_value_out_of_range_is_reported_with_its_place(config):
    with pytest.raises(
        SettingsError, match=r"training\.sgo_initial: .*\[0, 1\].*\(override 'training.sgo_initial=2'\)"
    ):
        load_settings(config, ["training.sgo_initial=2"]).training_arguments()
    with pytest.raises(SettingsError, match=r"expected one of dataset.*got 'of_policy'"):
        load_settings(config, ["training.policy=of_policy"]).training_arguments()


def test_coercion_of_unions():
    assert coerce("none", "none", list[str] | None) == ["none"]
    assert coerce(3, "3", float) == 3.0 and isinstance(coerce(3, "3", float), float)
    assert coerce(None, "null", int | None) is None
    with pytest.raises(CoercionError, match="expected an integer or null, got 'x'"):
        coerce("x", "x", int | None)


def test_examples_are_legal():
    found = [path for path in (ROOT / "examples").glob("*.yaml") if path.name != "demo.yaml"]
    assert found
    for path in found:
        load_settings(path, ["training.use_cpu=true", "training.bf16=false"]).training_arguments()


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


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
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
    from distillm_ext.training.progress import ProgressBar

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
