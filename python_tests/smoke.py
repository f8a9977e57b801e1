"""Every part of the package once, with models made on the spot: `python python_tests/smoke.py`, under a minute.

A loss with its gradient; a conversation tokenised; training on the student's own responses through the command line,
stopped and resumed; the teacher captured to disk and read from there; an evaluation with ROUGE-L; a picture of the
run; LoRA; a GGUF file. It says of one set of installed packages whether the code fits them: `.ci/check_floors` runs it
at the oldest versions that pyproject.toml promises.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from cli_world import run, settings_text, write_world
from data_world import CHATML, TALK, make_bpe, prepare, targets
from gguf_world import write_gguf
from trainer_world import tiny_config, tiny_model, tiny_trainer

import distillm_ext
from distillm_ext.evaluation.plots import plot_training
from distillm_ext.models.loading import load_student, load_teacher, load_tokenizer


def check_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 101, generator=draw) for _ in range(2))
    student.requires_grad_()
    distillm_ext.distillation_loss(student, teacher, divergence="reverse_kl").backward()
    reference = student.detach().double().requires_grad_()
    log_q, log_p = reference.log_softmax(-1), teacher.double().log_softmax(-1)
    (log_q.exp() * (log_q - log_p)).sum(-1).mean().backward()
    torch.testing.assert_close(student.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def check_conversation() -> None:
    tokenizer = make_bpe(CHATML)
    row = prepare([{"messages": TALK}], tokenizer)[0]
    assert "the end" in tokenizer.decode(targets(row)), tokenizer.decode(row["input_ids"])


def check_commands(folder: Path) -> None:
    world = write_world(folder)
    config = folder / "run.yaml"
    config.write_text(settings_text(world, folder / "out", policy="on_policy", max_steps=1, save_steps=1))
    run("train", config)
    assert "resuming from" in run("train", config, "training.max_steps=2")
    history = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert plot_training(history, folder / "run.png").stat().st_size > 0

    run("capture", "--config", config, "--out", folder / "cache", "--k", 8)
    run("train", config, f"teacher={folder / 'cache'}", f"student={world / 'teacher'}", "training.policy=dataset",
        f"training.output_dir={folder / 'cached'}")  # fmt: skip
    metrics = folder / "metrics.json"
    run("evaluate", folder / "out" / "final", "--dataset", world / "eval.jsonl", "--teacher", world / "teacher",
        "--generate", 4, "--max-new-tokens", 8, "--output", metrics)  # fmt: skip
    found = json.loads(metrics.read_text())
    assert found["kl"] > 0 and found["rouge_l"] >= 0, found


def check_lora(folder: Path) -> None:
    model = peft.get_peft_model(tiny_model(1), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    trainer = tiny_trainer(tiny_config(folder / "lora", policy="on_policy", max_steps=2), model=model)
    assert trainer.train().training_loss > 0
    trainer.save_model()
    assert (folder / "lora" / "adapter_model.safetensors").is_file()


def check_gguf(folder: Path) -> None:
    write_gguf(folder)
    tokenizer = load_tokenizer(folder / "tiny.gguf")
    tokens = tokenizer("ab", return_tensors="pt").input_ids
    assert tokens.tolist() == [[2]] and (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>"), tokenizer
    student = load_student({"keep_layers": 1}, teacher=load_teacher(folder / "tiny.gguf"))
    student(tokens, labels=tokens).loss.backward()


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        check_loss()
        check_conversation()
        for check in (check_commands, check_lora, check_gguf):
            check(Path(temporary))
            print("smoke:", check.__name__.removeprefix("check_"), flush=True)
    print(f"smoke: {distillm_ext.__file__} runs on Python {sys.version.split()[0]}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
