"""Runs that reuse teacher logits, in processes of their own.

reuse_worker.py train OUT [--kill-after-step N] [--resume]
forks.run("reuse_worker", "ranks", OUT, processes=2)
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from trainer_worker import (
    InterruptAfterStep,
    InterruptedRun,
    KillAfterStep,
    job_settings,
    save_result,
)
from trainer_world import tiny_config, tiny_model, tiny_trainer, weights

# Jobs of several ranks; the data job sees each row in every epoch, so its second one must not need the teacher.
RANK_JOBS = {
    "data": dict(policy="dataset", max_steps=8, reuse_teacher_logits="topk", reuse_k=16),
    "sample": dict(policy="dataset", max_steps=6, reuse_teacher_logits="sample", reuse_k=16),
    "adaptive": job_settings(max_steps=10, save_strategy="no", replay_capacity=16, reuse_teacher_logits="topk"),
}


def reuse_trainer(out, **overrides):
    """The job that is interrupted and resumed: several epochs, fresh and replayed batches."""
    settings = dict(reuse_teacher_logits="topk", reuse_k=8, replay_capacity=8, eval_steps=100) | overrides
    return tiny_trainer(
        tiny_config(out, **job_settings(**settings)), rows=12, model=tiny_model(1, attention_dropout=0.2)
    )


def rank_trainer(out, job, *, batch_size):
    settings = {"max_grad_norm": 0.0} | RANK_JOBS[job] | {"per_device_train_batch_size": batch_size}
    return tiny_trainer(tiny_config(out, **settings))


def train(options):
    trainer = reuse_trainer(options.out)
    if options.kill_after_step:
        trainer.add_callback(KillAfterStep(options.kill_after_step))
    trainer.train(resume_from_checkpoint=options.resume)
    save_result(options.out, trainer)


def ranks(options):
    out = Path(options.out)
    for job in RANK_JOBS:
        trainer = rank_trainer(out / job, job, batch_size=2)
        trainer.train()
        extra = {"data": len(trainer.run.teaching.stores.data), "replay": len(trainer.run.teaching.stores.replay)}
        save_result(out / job, trainer, f"rank{trainer.args.process_index}", extra)
    whole = reuse_trainer(out / "whole", max_steps=8)
    whole.train()
    interrupted = reuse_trainer(out / "parts", max_steps=8)
    interrupted.add_callback(InterruptAfterStep(5))
    try:
        interrupted.train()
    except InterruptedRun:
        interrupted.accelerator.wait_for_everyone()
    resumed = reuse_trainer(out / "parts", max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    rank = resumed.args.process_index
    save_result(out, whole, f"whole{rank}")
    save_result(out, resumed, f"resumed{rank}")
    save_file(weights(resumed), out / f"last{rank}.safetensors")
    # Everything is written. gloo may abort while it is torn down, which is no longer part of the test.
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["train", "ranks"])
    parser.add_argument("out")
    parser.add_argument("--kill-after-step", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    {"train": train, "ranks": ranks}[options.mode](options)


if __name__ == "__main__":
    main()
