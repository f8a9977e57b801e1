"""The demo: its plan, the tiny world, and the whole of `distillm demo --tiny` in a reduced setting."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiers import full
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_ext.cli.tables import report_progress
from distillm_ext.demo.run import CONTROL, DISTILLED, START, TEACHER, Demo, World, write_world_rows
from distillm_ext.demo.settings import load_plan
from distillm_ext.demo.tiny import make_tiny_world, make_tokenizer, train_teacher, write_rows
from distillm_ext.demo.worlds import alpaca_messages, tiny_world
from distillm_ext.runs.settings import SettingsError, load_settings

# ---- the tiny world


def test_rows_are_a_function_of_the_seed_with_distinct_prompts():
    rows = write_rows(200, seed=3)
    assert rows == write_rows(200, seed=3) != write_rows(200, seed=4)
    assert len({row["prompt"] for row in rows}) == 200


def test_every_answer_is_right():
    def right(name, items):
        return {
            "copy": items, "reverse": items[::-1], "sort": sorted(items), "count": [str(len(items))],
            "last": items[-1:], "add": [str(sum(map(int, items)))] if name == "add" else [],
        }.get(name)  # fmt: skip

    seen = set()
    for row in write_rows(300, seed=0):
        name, *items = row["prompt"].removesuffix(" = ").split()
        seen.add(name)
        if name == "pick":
            assert row["completion"] in items
        else:
            assert row["completion"].split() == right(name, items), row
    assert seen == {"copy", "reverse", "sort", "count", "add", "last", "pick"}


def test_asking_for_more_rows_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="too few distinct prompts"):
        write_rows(20_000, seed=0)


def test_world_holds_out_prompts_that_training_has_not():
    world = make_tiny_world(seed=1, train_rows=50, heldout_rows=20)
    assert (len(world.train), len(world.heldout)) == (50, 20)
    assert not set(world.train["prompt"]) & set(world.heldout["prompt"])


def test_tokenizer_has_one_token_per_character_and_survives_saving(tmp_path):
    tokenizer = make_tokenizer()
    for row in write_rows(50, seed=0):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert len(ids) == len(row["prompt"]) and tokenizer.decode(ids) == row["prompt"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("add 7 5 = ")["input_ids"] == tokenizer("add 7 5 = ")["input_ids"]
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_teacher_learns_reproducibly_and_leaves_the_random_state_alone():
    tokenizer, calls = make_tokenizer(), []
    state = torch.get_rng_state()
    first = train_teacher(tokenizer, seed=1, steps=4, batch_size=8, progress=lambda *call: calls.append(call))
    assert torch.equal(torch.get_rng_state(), state)
    assert calls[-1] == (4, 4) and len(calls) == 4
    again, other = (train_teacher(tokenizer, seed=s, steps=4, batch_size=8) for s in (1, 2))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.model.norm.weight, other.model.norm.weight)
    assert not first.training and not any(p.requires_grad for p in first.parameters())


# ---- the plan


@pytest.mark.parametrize("name", ["demo.yaml", "tiny.yaml"])
def test_plans_of_the_package_are_legal_and_adaptive(name):
    plan = load_plan(name)
    assert plan.training["policy"] == "adaptive_off_policy" and plan.training["sgo_initial"] > 0
    assert 0 < plan.training["warmup_objective_steps"] < plan.training["max_steps"]
    settings = plan.settings(teacher=Path("t"), train=Path("a"), validation=Path("b"), output_dir=Path("o"))
    settings.training_arguments()


def test_control_differs_from_the_distilled_arm_in_the_objective_alone():
    plan = load_plan("demo.yaml")
    settings = plan.settings(teacher=Path("t"), train=Path("a"), validation=Path("b"), output_dir=Path("o"))
    control = plan.control(settings, Path("c"))
    changed = {k for k in settings.training if settings.training[k] != control.training.get(k)}
    assert changed == {"output_dir", "policy", "eval_strategy", "warmup_objective", "warmup_objective_steps"}
    assert control.training["warmup_objective"] == "sft"
    assert control.training["warmup_objective_steps"] == settings.training["max_steps"]


def test_example_is_the_plan_of_the_demo():
    examples = Path(__file__).parent.parent / "examples"
    package = Path(load_plan.__code__.co_filename).parent
    assert (examples / "demo.yaml").read_text() == (package / "demo.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("demo.train_row=3", "unknown key 'demo.train_row'.*did you mean 'train_rows'"),
        ("demo.train_rows=x", "demo.train_rows: expected an integer"),
        ("demo.train_rows=0", "demo.train_rows: expected an int >= 1"),
        ("demo.generate_rows=1000", "expected at most heldout_rows"),
        ("training.learning_rat=1", "did you mean 'learning_rate'"),
        ("demos.x=1", "did you mean 'demo'"),
        ("training.max_steps=-1", "training.max_steps"),
        ("demo=3", "demo: expected a mapping"),
        ("training=3", "training: expected a mapping"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(SettingsError, match=message):
        load_plan("tiny.yaml", [override])


def test_alpaca_rows_become_conversations():
    table = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi"},
    ]
    rows = alpaca_messages(table, seed=0)
    users = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert users == {"Add.\n\n1 2": "3", "Greet.": "Hi"}
    many = [{"instruction": str(i), "output": "x"} for i in range(50)]
    assert alpaca_messages(many, 0) == alpaca_messages(many, 0) != alpaca_messages(many, 1)


def test_too_few_rows_for_the_plan_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are 2 rows; ask for fewer"):
        write_world_rows(tmp_path, [{}, {}], load_plan("tiny.yaml").options, tmp_path)


def test_training_settings_are_checked_before_a_model_is_loaded(tmp_path):
    plan = load_plan("tiny.yaml", ["training.teacher_dtype=int8"])
    world = World(*(tmp_path / name for name in ("nowhere", "train.jsonl", "heldout.jsonl", "validation.jsonl")))
    with pytest.raises(ValueError, match="teacher_dtype: expected one of auto, .* got 'int8'"):
        Demo(plan, world, tmp_path, Console(file=io.StringIO()), None)


# ---- end to end


@pytest.fixture(scope="module", params=[60, *full(120)])
def outcome(request, tmp_path_factory):
    """`distillm demo --tiny` with a weaker teacher and fewer steps."""
    folder, steps = tmp_path_factory.mktemp("demo"), request.param
    plan = load_plan(
        "tiny.yaml",
        [f"demo.teacher_steps={2 * steps}", f"training.max_steps={steps}",
         f"training.warmup_objective_steps={steps // 4}", f"training.eval_steps={steps // 4}",
         "demo.train_rows=128", "demo.heldout_rows=48", "demo.validation_rows=32", "demo.generate_rows=24",
         "training.logging_steps=10"],
    )  # fmt: skip
    console = Console(file=io.StringIO())
    world = tiny_world(folder / "world", plan.options)
    made = Demo(plan, world, folder, console, lambda text: report_progress(console, text)).run()
    return made, folder, console.file.getvalue()


def test_fresh_and_replayed_batches_really_occur(outcome):
    made, folder, _ = outcome
    assert sum(made.batches.values()) == load_settings(folder / "distilled" / "settings.yaml").training["max_steps"]
    assert min(made.batches.values()) > 0
    log = json.loads((folder / "distilled" / "log.json").read_text())
    assert {entry["batch_source"] for entry in log if "batch_source" in entry} & {"fresh", "replay"}


def test_distilled_student_is_closer_to_the_teacher_than_start_and_control(outcome):
    results = outcome[0].results
    assert list(results) == [START, CONTROL, DISTILLED, TEACHER]
    assert results[DISTILLED].kl < 0.8 * results[CONTROL].kl
    assert results[DISTILLED].kl < 0.5 * results[START].kl
    assert results[TEACHER].kl == pytest.approx(0, abs=1e-6)


def test_console_names_figures_that_exist(outcome):
    printed = outcome[2]
    assert f"{DISTILLED}: KL 0." in printed or f"{DISTILLED}: KL 1." in printed
    assert f"{TEACHER}: cross-entropy " in printed and "nan" not in printed


def test_saved_student_loads_and_is_smaller(outcome):
    made, folder, _ = outcome
    student = AutoModelForCausalLM.from_pretrained(made.student)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "world" / "teacher")
    assert student.config.num_hidden_layers < teacher.config.num_hidden_layers
    assert AutoTokenizer.from_pretrained(made.student)("add 1 2 = ")["input_ids"]


def test_report_plot_and_settings_are_written(outcome):
    made, folder, _ = outcome
    text = made.report.read_text()
    for part in ("| SFT control |", "| distilled |", "on fresh", "on replay", "(training.png)", "sgo_initial: 0.4"):
        assert part in text, part
    assert made.plot.read_bytes().startswith(b"\x89PNG")
    assert load_settings(folder / "distilled" / "settings.yaml").student == {"keep_layers": 2}
    assert json.loads((folder / "results.json").read_text())["batches"] == made.batches
