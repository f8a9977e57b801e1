"""A tiny untrained teacher, rows and settings files on disk for tests of the command line, and a call of it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from distillm_ext.cli.main import app
from distillm_ext.demo.tiny import make_tokenizer, write_rows

ROOT = Path(__file__).parent.parent


def write_world(folder: Path) -> Path:
    """A tiny untrained teacher and rows."""
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


def write_settings(world: Path, folder: Path) -> Path:
    """A settings file in `folder` for a run that writes to `folder / "out"`."""
    path = folder / "run.yaml"
    path.write_text(settings_text(world, folder / "out"))
    return path


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())
