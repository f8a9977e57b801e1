"""Time of an optimizer step with the teacher's output kept, against plain KD and SFT, and what keeping it takes.

    python benchmarks/bench_teacher_reuse.py [--threads 2] [--rounds 3] [--vocab 32000]

One process, candidates in turns, medians. "kd" runs the teacher in every step, "sft" has none. A reuse trainer is timed
in its first epoch, which computes and keeps, and in its second, which only reads; a replay step reads what was kept
with generated sequences. Models: Llamas from a random initialisation, teacher about 4x the student.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging as transformers_logging

from distillm_ext.training import DistillationConfig, DistillationTrainer

RESULTS = Path(__file__).parent / "results"
HEADER = ["step", "median_ms", "ratio_to_kd", "ratio_to_sft", "store_mib", "bytes_per_token"]


class StepTimes(TrainerCallback):
    """Wall-clock time of every optimizer step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self._began)


def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, vocab))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


def model_of(vocab: int, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
            bos_token_id=None,
        )
    )  # fmt: skip


def rows_of(count: int, length: int, vocab: int) -> Dataset:
    rng = np.random.default_rng(0)
    prompt = length // 3
    ids = rng.integers(2, vocab, (count, length))
    mask = [0] * prompt + [1] * (length - prompt)
    return Dataset.from_list([{"input_ids": row.tolist(), "loss_mask": mask, "prompt_length": prompt} for row in ids])


def trainer_of(options: argparse.Namespace, folder: str, **settings: Any) -> tuple[DistillationTrainer, StepTimes]:
    times = StepTimes()
    config = DistillationConfig(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        logging_steps=settings.pop("logging_steps", 10**6),
        per_device_train_batch_size=options.batch, max_prompt_length=options.length, max_length=options.length + 1,
        max_new_tokens=8, learning_rate=1e-5, **settings,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model_of(options.vocab, 256, 3, 1), model_of(options.vocab, 512, 6, 2), config,
        train_dataset=rows_of(2 * options.batch, options.length, options.vocab),
        eval_dataset=rows_of(options.batch, options.length, options.vocab),
        processing_class=tokenizer_of(options.vocab), callbacks=[times],
    )  # fmt: skip
    return trainer, times


def timed(options: argparse.Namespace, name: str, settings: dict[str, Any], found: dict[str, list[float]]) -> float:
    """Adds the times of one short run to `found`; returns the MiB of kept records."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, times = trainer_of(options, folder, **settings)
        trainer.train()
        sizes = trainer.run.teaching.sizes()
        sources = [entry["batch_source"] for entry in trainer.state.log_history if "batch_source" in entry]
    steps = times.times[1:]  # the first one allocates
    if settings.get("policy") == "adaptive_off_policy":
        found.setdefault(name + " replay step", []).extend(
            t for t, source in zip(times.times, sources, strict=True) if source == "replay"
        )
    elif settings.get("reuse_teacher_logits", "off") == "off":
        found.setdefault(name, []).extend(steps)
    else:
        found.setdefault(name + " first epoch", []).append(times.times[1])
        found.setdefault(name + " second epoch", []).extend(times.times[2:])
    return sum(sizes.values())


def candidates() -> dict[str, dict[str, Any]]:
    sft = dict(warmup_objective="sft", warmup_objective_steps=4)
    replay = dict(
        policy="adaptive_off_policy", sgo_initial=1.0, replay_ratio="decreasing", replay_capacity=16,
        eval_strategy="steps", eval_steps=100, max_steps=8, logging_steps=1,
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = {"sft": dict(max_steps=4, **sft), "kd": dict(max_steps=4)}
    for method in ("topk", "sample"):
        found[method] = dict(max_steps=6, reuse_teacher_logits=method)
        found[method + ","] = dict(reuse_teacher_logits=method, **replay)
    found["kd,"] = replay
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS / "teacher_reuse_cpu.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    found: dict[str, list[float]] = {}
    sizes: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, settings in candidates().items():
            sizes[name] = timed(options, name, settings, found)
    tokens = 2 * options.batch * (options.length - options.length // 3)
    lines = []
    for name, times in found.items():
        value = median(times)
        held = sizes.get(name.split(" ")[0], 0.0)
        per_token = held * 2**20 / tokens if held and "epoch" in name else 0.0
        ratios = [value / median(found[other]) for other in ("kd", "sft")]
        lines.append([name, *(f"{x:.3f}" for x in (value * 1e3, *ratios, held)), f"{per_token:.0f}"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *lines])
    for line in [HEADER, *lines]:
        print(" ".join(f"{value:>22}" for value in line))


if __name__ == "__main__":
    main()
