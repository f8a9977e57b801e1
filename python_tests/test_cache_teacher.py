"""A cache as the teacher of a run: without a model, beside one, and from a settings file."""

import json

import numpy as np
import pytest
import torch
import yaml
from capture_world import LENGTHS, capture_settings, write_world
from cli_world import run
from datasets import Dataset
from trainer_world import adaptive, logged, tiny_config, weights
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from distillm_ext.cli.main import app
from distillm_ext.demo.tiny import write_rows
from distillm_ext.runs.capture import Processes, capture
from distillm_ext.teacher import CacheMismatch, TeacherCache
from distillm_ext.training import DistillationTrainer

SETTINGS = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, **LENGTHS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("world"))
    capture(capture_settings(folder, folder / "cache", k=45, codec="exact"), processes=Processes())
    capture(capture_settings(folder, folder / "drawn", k=16, method="sample"), processes=Processes())
    capture(capture_settings(folder, folder / "warm", temperatures=(2.0,)), processes=Processes())
    return folder


def rows(world, name="train"):
    return Dataset.from_list([json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()])


def trainer_of(world, out, teacher, *, train=None, model="other", evaluate=True, **settings):
    extra = {name: settings.pop(name) for name in ("teacher_cache",) if name in settings}
    return DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(world / model, dtype=torch.float32),
        teacher=teacher,
        args=tiny_config(out, **(SETTINGS | settings)),
        train_dataset=rows(world) if train is None else train,
        eval_dataset=rows(world, "eval") if evaluate else None,
        processing_class=AutoTokenizer.from_pretrained(world / "teacher"),
        **extra,
    )


def teacher_model(world, name="teacher"):
    return AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32)


def test_training_without_the_teacher_is_training_with_it(world, tmp_path):
    """All entries are kept in full precision: the two runs differ by rounding alone."""
    settings = dict(eval_strategy="steps", eval_steps=3, ce_weight=0.2, learning_rate=1e-3)
    present = trainer_of(world, tmp_path / "a", teacher_model(world), **settings)
    present.train()
    absent = trainer_of(world, tmp_path / "b", world / "cache", **settings)
    assert absent.teacher is None
    absent.train()
    for name in ("loss", "eval_loss", "eval_divergence"):
        assert logged(absent, name) == pytest.approx(logged(present, name), rel=2e-3)
    for name, value in weights(present).items():
        torch.testing.assert_close(weights(absent)[name], value, rtol=1e-2, atol=2e-3)
    assert logged(absent, "teacher_rows") == [0.0] * 6 and logged(absent, "reused_rows") == [4.0] * 6


def test_an_open_cache_and_draws(world, tmp_path):
    trainer = trainer_of(world, tmp_path, TeacherCache.open(world / "drawn"), eval_strategy="steps", eval_steps=6)
    assert trainer.run.tail == "sampled"
    trainer.train()
    assert all(np.isfinite(logged(trainer, name)).all() for name in ("loss", "eval_divergence"))


@pytest.mark.parametrize("policy", ["on_policy", "mixed", "batched_on_policy", "teacher_responses"])
def test_policies_that_need_fresh_responses_need_a_model(world, tmp_path, policy):
    with pytest.raises(ValueError, match=f"policy: '{policy}' trains on responses that .* writes during the run"):
        trainer_of(world, tmp_path, world / "cache", policy=policy)


def test_the_adaptive_policy_needs_a_model_and_runs_with_one(world, tmp_path):
    settings = adaptive(max_steps=10, eval_steps=100)
    with pytest.raises(ValueError, match="policy: 'adaptive_off_policy'"):
        trainer_of(world, tmp_path, world / "cache", **settings)
    trainer = trainer_of(world, tmp_path, teacher_model(world), teacher_cache=world / "cache", **settings)
    trainer.train()
    asked = zip(logged(trainer, "batch_source"), logged(trainer, "teacher_rows"), strict=False)
    assert {source for source, count in asked if count > 0} == {"fresh"}
    assert {"data", "replay"} <= set(logged(trainer, "batch_source"))


def test_a_model_computes_what_the_cache_lacks_and_keeps_it(world, tmp_path):
    new = Dataset.from_list(write_rows(8, seed=5))
    trainer = trainer_of(world, tmp_path, teacher_model(world), teacher_cache=world / "cache", train=new, max_steps=4)
    trainer.train()
    assert logged(trainer, "teacher_rows") == [4.0, 4.0, 0.0, 0.0]


def test_rows_that_are_not_in_the_cache_are_named_before_training(world, tmp_path):
    more = Dataset.from_list([*rows(world).to_list()[:3], {"prompt": "add 3 3 = ", "completion": "never"}])
    with pytest.raises(ValueError, match=r"train_dataset: row 3 \(\d+ tokens, first \[.*\]\) is not in the cache"):
        trainer_of(world, tmp_path, world / "cache", train=more)
    with pytest.raises(ValueError, match=r"train_dataset: row \d+ .*max_prompt_length and max_length"):
        trainer_of(world, tmp_path, world / "cache", max_length=12, max_prompt_length=8)
    capture(capture_settings(world, tmp_path / "few", rows=32), processes=Processes())


def test_rows_that_only_an_epoch_would_have_met_are_named_too(world, tmp_path):
    trainer = trainer_of(world, tmp_path, world / "cache")
    batch = trainer.data_collator([dict(input_ids=[5, 6, 7], loss_mask=[0, 1, 1], prompt_length=1, row=11)])
    with pytest.raises(ValueError, match="teacher: the cache has no row 11"):
        trainer.run.teaching.targets(batch)


def test_what_a_cache_cannot_give_is_refused(world, tmp_path):
    cases = [
        ("cache", dict(divergence="alpha_beta"), "divergence: 'alpha_beta' needs all"),
        ("cache", dict(temperature=2.0), "temperature: 2 was not captured; the cache has 1"),
        ("cache", dict(reuse_teacher_logits="sample"), "the cache was captured with method 'topk'"),
        ("cache", dict(tail="sampled"), "tail: 'sampled' weighs entries"),
        ("drawn", dict(divergence="reverse_kl"), "'reverse_kl' has no unbiased form"),
        ("warm", dict(temperature=2.0), "eval_dataset: the divergence of the validation"),
        ("warm", dict(temperature=2.0, warmup_objective="forward_kl", warmup_objective_steps=2), "perature: 1 was not"),
        ("nowhere", dict(), "there is no cache of teacher logits at"),
    ]  # fmt: skip
    for name, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer_of(world, tmp_path, world / name, **settings)
    trainer_of(world, tmp_path, world / "warm", temperature=2.0, evaluate=False).train()


def test_a_cache_of_another_teacher_or_tokenizer_is_refused(world, tmp_path):
    with pytest.raises(CacheMismatch, match="another teacher"):
        trainer_of(world, tmp_path, teacher_model(world, "other"), teacher_cache=world / "cache")
    trainer = trainer_of(world, tmp_path, world / "cache")
    tokenizer = AutoTokenizer.from_pretrained(world / "teacher")
    tokenizer.add_tokens(["new"])
    with pytest.raises(CacheMismatch, match="another tokenizer"):
        DistillationTrainer(trainer.model, world / "cache", trainer.args, rows(world), processing_class=tokenizer)


def test_the_teacher_argument(world, tmp_path):
    with pytest.raises(TypeError, match="teacher: expected a causal language model, or a cache"):
        trainer_of(world, tmp_path, None)
    with pytest.raises(ValueError, match="teacher_cache: teacher is a cache already"):
        trainer_of(world, tmp_path, world / "cache", teacher_cache=world / "cache")


# ---- settings file


def settings_file(world, out, **top):
    training = dict(
        output_dir=str(out), logging_steps=1, report_to="none", use_cpu=True, eval_strategy="steps", eval_steps=3,
        **SETTINGS,
    )  # fmt: skip
    values = {
        "student": str(world / "other"), "teacher": str(world / "cache"),
        "dataset": {"train": str(world / "train.jsonl"), "eval": str(world / "eval.jsonl")}, "training": training,
    }  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values | top))
    return path


def test_train_from_a_cache(world, tmp_path):
    shown = run("train", settings_file(world, tmp_path / "out"))
    assert "teacher logits of 40 rows from" in shown and "teacher 0 rows, reused 4" in shown
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert "kept teacher logits" in shown


def test_train_from_a_model_and_a_cache(world, tmp_path):
    both = {"name": str(world / "teacher"), "cache": str(world / "cache")}
    shown = run("train", settings_file(world, tmp_path / "out", teacher=both, student={"keep_layers": 1}))
    assert "M, teacher logits of 40 rows from" in shown


def test_a_cut_student_needs_the_model(world, tmp_path):
    path = settings_file(world, tmp_path / "out", student={"keep_layers": 1})
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 2 and "student: is cut from the teacher's layers" in result.stderr


def test_capture_takes_model_rows_and_lengths_from_the_settings_file(world, tmp_path):
    path = settings_file(
        world, tmp_path / "out", teacher={"name": str(world / "teacher"), "cache": str(tmp_path / "c")}
    )
    run("capture", "--config", path, "--out", tmp_path / "c", "--k", 16)
    cache = TeacherCache.open(tmp_path / "c")
    assert len(cache) == 40 and cache.spec.details["max_length"] == LENGTHS["max_length"]
    assert "teacher logits of 40 rows" in run("train", path)
