"""Settings of the command line: values and messages from YAML files and overrides."""

from __future__ import annotations

import pytest
from cli_world import ROOT, settings_text, write_settings, write_world

from distillm_ext.runs.coercion import CoercionError, coerce
from distillm_ext.runs.settings import SettingsError, load_settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def config(world, tmp_path):
    return write_settings(world, tmp_path)


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
