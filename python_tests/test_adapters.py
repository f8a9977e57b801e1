"""Folders of adapters in place of whole models, and the dtypes that models load in."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cli_world import run, settings_text, write_world
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from distillm_ext.models.loading import load_student, load_teacher, load_tokenizer
from distillm_ext.runs.job import load_models
from distillm_ext.runs.settings import settings_from_dict


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, a LoRA adapter on it with one more token, and their merged model's logits."""
    folder = write_world(tmp_path_factory.mktemp("adapters"))
    base = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_tokens(["<more>"])
    base.resize_token_embeddings(len(tokenizer))
    options = LoraConfig(
        target_modules=["q_proj", "up_proj"], r=2, init_lora_weights=False, modules_to_save=["embed_tokens"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(4)
    adapted = get_peft_model(base, options)
    adapted.save_pretrained(folder / "lora")
    tokenizer.save_pretrained(folder / "lora")
    ids = torch.tensor([[3, 4, 5, len(tokenizer) - 1]])
    with torch.no_grad():
        return folder, ids, adapted.eval()(ids).logits


def test_an_adapter_loads_merged(world):
    folder, ids, expected = world
    model = load_teacher(folder / "lora")
    assert type(model).__name__ == "LlamaForCausalLM" and not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(load_tokenizer(folder / "lora")) == ids.max() + 1


def test_an_adapter_in_the_commands(world, tmp_path):
    folder, _, _ = world
    run("evaluate", folder / "lora", "--dataset", folder / "eval.jsonl", "--generate=2", "--max-new-tokens=4",
        "--max-length=40", "--output", tmp_path / "m.json")  # fmt: skip
    assert json.loads((tmp_path / "m.json").read_text())["rouge_l"] is not None
    (tmp_path / "run.yaml").write_text(settings_text(folder, tmp_path / "out", max_steps=2))
    run("train", tmp_path / "run.yaml", f"teacher={folder / 'lora'}")
    run("capture", "--config", tmp_path / "run.yaml", "--teacher", folder / "lora", "--out", tmp_path / "c", "--rows=2")


def test_adapters_that_cannot_be_used(world, tmp_path, monkeypatch):
    folder, _, _ = world
    config = json.loads((folder / "lora/adapter_config.json").read_text())
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model_name_or_path is missing"):
        load_teacher(nameless)
    base = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(ValueError, match="virtual tokens.*cannot be merged"):
        load_teacher(tmp_path / "p")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"PEFT is not installed: pip install 'distillm_ext\[lora\]'"):
        load_teacher(folder / "lora")


def test_models_of_another_kind_on_disk(world, tmp_path):
    folder, _, _ = world
    base = AutoModelForCausalLM.from_pretrained(folder / "teacher", tie_word_embeddings=False)
    LlamaForSequenceClassification(base.config).save_pretrained(tmp_path / "classifier")
    base.model.save_pretrained(tmp_path / "headless")
    T5(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    for name, message in (
        ("classifier", "lacks 1 weights of LlamaForCausalLM (lm_head.weight)"),
        ("headless", "lacks 1 weights of LlamaForCausalLM (lm_head.weight)"),
        ("t5", "is no causal language model (its configuration is T5Config)"),
    ):
        with pytest.raises(ValueError) as error:
            load_teacher(tmp_path / name)
        assert message in str(error.value) and len(str(error.value)) < 300
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/manifest.json").touch()
    for name, message in ((tmp_path / "cache", "cache of a teacher's output"), (folder / "train.jsonl", "is a file")):
        with pytest.raises(ValueError, match=message):
            load_teacher(name)
    with pytest.raises(TypeError, match="a model is named by a string.*got LlamaForCausalLM"):
        load_teacher(base)


def test_dtypes(world, tmp_path):
    folder, _, _ = world
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(half)
    assert load_teacher(half).dtype == torch.float32 and load_teacher(half, "auto").dtype == torch.bfloat16
    assert load_student({"name": str(half), "dtype": "float16"}).dtype == torch.float16
    with pytest.raises(ValueError, match="student.dtype must be auto, float32"):
        load_student({"name": str(half), "dtype": "int8"})

    def loaded(student, teacher_dtype="auto"):
        values = {"student": student, "teacher": str(half), "dataset": "x.jsonl"}
        models = load_models(settings_from_dict(values, "test"), teacher_dtype)
        return models.student.dtype, models.teacher.dtype

    assert loaded(str(half)) == (torch.float32, torch.bfloat16)
    assert loaded(str(half), teacher_dtype="float32") == (torch.float32, torch.float32)
    assert loaded({"keep_layers": 2}) == (torch.float32, torch.bfloat16)
    assert loaded({"keep_layers": 2, "dtype": "auto"})[0] == torch.bfloat16
    assert loaded({"name": str(half), "dtype": "bfloat16"})[0] == torch.bfloat16


def test_an_adapter_keeps_what_ends_a_response(tmp_path):
    from trainer_world import EOS, tiny_config, tiny_model, tiny_trainer

    base = tiny_model(1)
    base.save_pretrained(tmp_path / "base")
    student = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer = tiny_trainer(tiny_config(tmp_path / "out", max_steps=1), model=student)
    trainer.model.get_base_model().generation_config.eos_token_id = [EOS, 9]
    trainer.save_model(str(tmp_path / "final"))
    assert load_teacher(tmp_path / "final").generation_config.eos_token_id == [EOS, 9]


@pytest.mark.parametrize("beside_default", [False, True])
def test_an_adapter_of_another_name(tmp_path, beside_default):
    """It is saved in a folder of its name: loaded from there as the best one, and never taken for another."""
    from trainer_world import tiny_config, tiny_model, tiny_trainer

    base = tiny_model(1)
    base.save_pretrained(tmp_path / "base")
    options = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, task_type="CAUSAL_LM")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if beside_default:
        student = get_peft_model(student, options)
        student.add_adapter("mine", options)
        student.set_adapter("mine")
    else:
        student = get_peft_model(student, options, adapter_name="mine")
    args = tiny_config(
        tmp_path / "out", max_steps=4, learning_rate=0.5, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer = tiny_trainer(args, model=student)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]  # the last is not the best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(ValueError, match="holds adapters in mine; name the one"):
        load_teacher(tmp_path / "final")
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = trainer.model.eval()(ids).logits
    torch.testing.assert_close(load_teacher(tmp_path / "final/mine")(ids).logits, expected, rtol=1e-4, atol=1e-4)
