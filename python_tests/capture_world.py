"""A teacher, rows and settings on disk for tests of `distillm capture`, and the same in a process of its own.

capture_world.py OUT [--kill-after-batches N] [--seed N] [--method M]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from distillm_ext.demo.tiny import make_tokenizer, write_rows
from distillm_ext.runs.capture import CaptureSettings, Processes, capture
from distillm_ext.runs.settings import DatasetSettings

LENGTHS = dict(max_prompt_length=24, max_length=40)


LAUNCHERS = {
    "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2",
    # --multi_gpu is what starts several processes; without a GPU they run on the CPU.
    "accelerate": "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no",
}


def launch(world, out, launcher):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *LAUNCHERS[launcher].split(), __file__, str(world), str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240).stderr


def write_world(folder: Path, rows: int = 40) -> Path:
    """A tiny untrained teacher, another one with the same tokenizer, and rows."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    for seed, name in enumerate(("teacher", "other")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    text = [json.dumps(row) for row in write_rows(rows, seed=0)]
    (folder / "train.jsonl").write_text("\n".join(text[: rows - 8]))
    (folder / "eval.jsonl").write_text("\n".join(text[rows - 8 :]))
    return folder


def capture_settings(world: Path, out: Path, **overrides) -> CaptureSettings:
    dataset = DatasetSettings(str(world / "train.jsonl"), str(world / "eval.jsonl"))
    settings = dict(teacher=str(world / "teacher"), dataset=dataset, out=out, k=16, batch_size=4, **LENGTHS)
    return CaptureSettings(**(settings | overrides))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("world", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill-after-batches", type=int)
    parser.add_argument("--method", default="topk")
    options = parser.parse_args()
    batches = 0

    def progress(count, total):
        nonlocal batches
        batches += 1
        if batches == options.kill_after_batches:
            os.kill(os.getpid(), signal.SIGKILL)

    # Every batch becomes a shard of its own.
    settings = capture_settings(options.world, options.out, method=options.method, flush_seconds=0.0)
    processes = Processes()
    count = capture(settings, processes=processes, progress=progress)
    report = {"rows": count.rows, "found": count.found, "tokens": count.tokens}
    (options.out / f"done{processes.rank}.json").write_text(json.dumps(report))
    # gloo may abort while it is torn down, which is no part of a test.
    os._exit(0)


if __name__ == "__main__":
    main()
