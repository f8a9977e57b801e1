"""Does a cache replace the teacher? Held-out KL of students trained with the teacher present and from caches.

    python benchmarks/evidence_teacher_cache.py [--k 2 8] [--steps 300] [--seeds 3]

The tiny world of `distillm demo --tiny`: a teacher is trained (under a minute), its output captured at k entries as
top-k and as draws, and the same student is trained with

    teacher       the teacher in memory, all entries
    bucket        from the top-k cache, what was not kept as one entry
    sampled       from the cache of draws, unbiased
    renormalize   from the top-k cache, the kept entries alone: what many projects do

The measure is the exact KL(teacher, student) on held-out rows, over all entries. One CSV, one plot.
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from distillm_ext.demo.tiny import make_tiny_world, teacher_config, train_teacher
from distillm_ext.evaluation.metrics import evaluate_student
from distillm_ext.runs.capture import CaptureSettings, Processes, capture
from distillm_ext.runs.settings import DatasetSettings
from distillm_ext.training import DistillationConfig, DistillationTrainer, prepare_dataset

RESULTS = Path(__file__).parent / "results"
LENGTHS = dict(max_prompt_length=32, max_length=64)
ARMS = ("teacher", "bucket", "sampled", "renormalize")


def student_of(tokenizer: Any, seed: int) -> LlamaForCausalLM:
    config = teacher_config(tokenizer)
    config.num_hidden_layers, config.intermediate_size = 2, 96
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def train(arm: str, caches: dict[str, Path], world: Any, teacher: Any, seed: int, options: argparse.Namespace) -> Any:
    source = teacher if arm == "teacher" else caches["drawn" if arm == "sampled" else "topk"]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", seed=seed,
            max_steps=options.steps, per_device_train_batch_size=16, learning_rate=3e-3, lr_scheduler_type="linear",
            warmup_steps=20, logging_steps=10**6, divergence=options.divergence,
            tail=None if arm == "teacher" else arm, **LENGTHS,
        )  # fmt: skip
        student = student_of(world.tokenizer, seed)
        trainer = DistillationTrainer(student, source, config, world.train, processing_class=world.tokenizer)
        trainer.train()
    return student.eval()


def make_caches(folder: Path, world: Any, teacher: Any, k: int) -> dict[str, Path]:
    teacher.save_pretrained(folder / "teacher")
    world.tokenizer.save_pretrained(folder / "teacher")
    world.train.to_json(folder / "train.jsonl")
    caches = {}
    for name, method in (("topk", "topk"), ("drawn", "sample")):
        caches[name] = folder / name
        rows = DatasetSettings(str(folder / "train.jsonl"))
        settings = CaptureSettings(
            str(folder / "teacher"), rows, caches[name], k=k, method=method, batch_size=64, **LENGTHS
        )
        capture(settings, processes=Processes())
    return caches


def plot(results: dict[tuple[int, str], list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    ks = sorted({k for k, _ in results})
    for index, arm in enumerate(ARMS):
        means = [mean(results[k, arm]) for k in ks]
        spread = [stdev(results[k, arm]) if len(results[k, arm]) > 1 else 0.0 for k in ks]
        places = [place + 0.18 * (index - 1.5) for place in range(len(ks))]
        axes.bar(places, means, width=0.17, yerr=spread, capsize=3, label=arm)
    axes.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
    axes.set_ylabel("held-out KL(teacher, student), nats per token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--output", type=Path, default=RESULTS / "teacher_cache_evidence.csv")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    world = make_tiny_world(seed=0)
    teacher = train_teacher(world.tokenizer, steps=options.teacher_steps)
    heldout = prepare_dataset(world.heldout, world.tokenizer, **LENGTHS)
    results: dict[tuple[int, str], list[float]] = {}
    dense: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for k in options.k:
            caches = make_caches(Path(folder) / str(k), world, copy.deepcopy(teacher), k)
            for seed in range(options.seeds):
                for arm in ARMS:
                    if arm != "teacher" or seed not in dense:
                        student = train(arm, caches, world, teacher, seed, options)
                        kl = evaluate_student(student, heldout, world.tokenizer, teacher=teacher, generate_rows=0).kl
                        assert kl is not None  # there is a teacher
                    if arm == "teacher":
                        kl = dense.setdefault(seed, kl)  # independent of k
                    results.setdefault((k, arm), []).append(kl)
                    print(f"k {k} seed {seed} {arm}: {kl:.4f}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["k", "arm", "mean_kl", "stdev", *(f"seed{seed}" for seed in range(options.seeds))])
        for (k, arm), found in results.items():
            spread = stdev(found) if len(found) > 1 else 0.0
            writer.writerow([k, arm, f"{mean(found):.4f}", f"{spread:.4f}", *(f"{value:.4f}" for value in found)])
    plot(results, options.output.with_suffix(".png"))
    print(options.output.read_text())


if __name__ == "__main__":
    main()
