"""Runs a training job in a process of its own, so that a test can kill it or start several.

    trainer_worker.py train OUT [--kill-after-step N] [--kill-in-save N] [--resume]
    forks.run("trainer_worker", "ranks", OUT, processes=2)

Results are files; a process group that aborts while it is torn down does not change them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from trainer_world import (
    GradientRecorder,
    adaptive,
    tiny_config,
    tiny_model,
    tiny_trainer,
    token_rows,
    weights,
)
from transformers import TrainerCallback

from distillm_ext.containers import LinearHead
from distillm_ext.linear import linear_cross_entropy_loss
from distillm_ext.models.logit_reader import TokenBatch
from distillm_ext.models.student_forward import StudentForward
from distillm_ext.training.checkpoints import resumable

TEXT = {"input_ids": [list(range(4, 50))] * 5}


def job_settings(**overrides):
    """Fresh, replayed and data batches, dropout, accumulation, plain text, a rising φ, frequent checkpoints."""
    settings = adaptive(
        max_steps=12, gradient_accumulation_steps=2, per_device_train_batch_size=2, save_strategy="steps", save_steps=2,
        save_total_limit=2, eval_steps=3, sgo_threshold=0.0, ce_weight=0.2, replay_capacity=8,
        lr_scheduler_type="cosine",
    )  # fmt: skip
    return settings | overrides


def job_trainer(out, **overrides):
    """The job that is interrupted and resumed."""
    return tiny_trainer(
        tiny_config(out, **job_settings(**overrides)), model=tiny_model(1, attention_dropout=0.2),
        lm_dataset=Dataset.from_dict(TEXT),
    )  # fmt: skip


def kill_self(*args, **kwargs):
    """kill -9: nothing runs after it, no handler and no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfterStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kill_self()


def train(options):
    trainer = job_trainer(options.out)
    if options.kill_after_step:
        trainer.add_callback(KillAfterStep(options.kill_after_step))
    if options.kill_in_save:
        complete = resumable.mark_complete

        def mark_or_die(folder, *, step, resumable):
            if step == options.kill_in_save:
                kill_self()
            complete(folder, step=step, resumable=resumable)

        resumable.mark_complete = mark_or_die
    trainer.train(resume_from_checkpoint=options.resume)
    save_result(options.out, trainer)


def save_result(out, trainer, name="result", extra=None):
    save_file({key: value.contiguous() for key, value in weights(trainer).items()}, Path(out) / f"{name}.safetensors")
    history = [{k: v for k, v in entry.items() if "time" not in k} for entry in trainer.state.log_history]
    (Path(out) / f"{name}.json").write_text(json.dumps({"log_history": history, **(extra or {})}))


class InterruptedRun(Exception):
    pass


class InterruptAfterStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedRun


# Jobs of several ranks: settings, and whether there is plain text.
RANK_JOBS = {
    "dataset": (dict(policy="dataset", max_steps=3, eval_strategy="steps", eval_steps=3), False),
    "text": (dict(policy="dataset", max_steps=3, ce_weight=0.5, gradient_accumulation_steps=2), True),
    "tied": (dict(policy="dataset", max_steps=3), False),
    "adaptive": (job_settings(max_steps=10, save_strategy="no", replay_capacity=16), True),
    "batched": (dict(policy="batched_on_policy", max_steps=3), False),
}


def rank_trainer(out, job, *, batch_size):
    """The job on this rank, or all of it in a single process with a batch as large as all ranks' together."""
    settings, has_text = RANK_JOBS[job]
    recorder = GradientRecorder()
    trainer = tiny_trainer(
        tiny_config(out, **({"max_grad_norm": 0.0} | settings | {"per_device_train_batch_size": batch_size})),
        callbacks=[recorder], lm_dataset=Dataset.from_dict(TEXT) if has_text else None,
        model=tiny_model(1, tied=job == "tied"), eval_dataset=token_rows(7, seed=1),
    )  # fmt: skip
    return trainer, recorder


def ranks(options):
    """Every job over all ranks. Each rank reports what it decided, and its gradients and weights."""
    for job in RANK_JOBS:
        out = Path(options.out) / job
        trainer, recorder = rank_trainer(out, job, batch_size=2)
        trainer.train()
        extra = {
            "world_size": trainer.args.world_size,
            "buffer": [(seq.row, seq.input_ids.tolist()) for seq in trainer.rollouts.buffer.sequences()],
            "stored": {row: seq.input_ids.tolist() for row, seq in trainer.rollouts.store.by_row.items()},
        }
        save_result(out, trainer, f"rank{trainer.args.process_index}", extra)
        save_file(recorder.gradients, out / f"gradients{trainer.args.process_index}.safetensors")
    resume_over_ranks(Path(options.out) / "resume")
    sharded_gradients(Path(options.out) / "sharded")
    # Everything is written. gloo may abort while it is torn down, which is no longer part of the test.
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()
    os._exit(0)


def resume_over_ranks(out):
    """The interrupted job again, on all ranks."""
    whole = job_trainer(out / "whole", max_steps=8)
    whole.train()
    interrupted = job_trainer(out / "parts", max_steps=8)
    interrupted.add_callback(InterruptAfterStep(5))
    try:
        interrupted.train()
    except InterruptedRun:
        interrupted.accelerator.wait_for_everyone()
    resumed = job_trainer(out / "parts", max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    rank = resumed.args.process_index
    save_result(out, whole, f"whole{rank}")
    save_result(out, resumed, f"resumed{rank}")


def sharded_gradients(out):
    """FSDP2 around the student: the gradient of a loss computed in the head, whichever unit holds the head."""

    def consume(rows):
        if isinstance(rows[0], LinearHead):
            return linear_cross_entropy_loss(rows[0], torch.tensor([5, 5, 5]), reduction="sum")
        return -rows[0].log_softmax(-1)[:, 5].sum()

    from torch.distributed.fsdp import fully_shard

    batch = TokenBatch(torch.arange(4, 34).view(2, 15), torch.ones(2, 15, dtype=torch.long), torch.tensor([3, 7, 20]))
    out.mkdir(parents=True, exist_ok=True)
    for name, tied, own_unit in (("untied", False, False), ("tied", True, False), ("own_unit", False, True)):
        model = tiny_model(1, layers=2, tied=tied)
        for module in (*model.model.layers, *([model.lm_head] if own_unit else [])):
            fully_shard(module)
        fully_shard(model)
        student = StudentForward(model, contextlib.nullcontext)
        for suffix, fused in (("", False), ("_fused", True)):
            student(model, [batch], consume, fused=fused).backward()
            gradients = {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
            model.zero_grad()
            if torch.distributed.get_rank() == 0:
                save_file(gradients, out / f"{name}{suffix}.safetensors")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["train", "ranks"])
    parser.add_argument("out")
    parser.add_argument("--kill-after-step", type=int)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    {"train": train, "ranks": ranks}[options.mode](options)


if __name__ == "__main__":
    main()
