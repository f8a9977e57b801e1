"""Runs of several ranks of which one alone meets a NaN; evaluation and router balance over ranks.

forks.run("nan_worker", OUT, processes=2)
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_nan_policy import make
from test_router_loss import moe
from trainer_world import GradientRecorder, tiny_config, tiny_model, tiny_trainer, token_rows, weights

from distillm_ext.training.faults.nan_policy import NanGuard, nonfinite_gradients

ON_DEVICE = NanGuard._on_device
# Two rows per rank and step, in order: rank 1 has rows 6 and 7 in step 2.
RUNS = {
    "skip": dict(faults=(7,)),
    "late": dict(faults=(7,), optim="adamw_torch_fused"),
    "stop": dict(faults=(7,), nan_policy="stop", save_strategy="steps", save_steps=1),
}


def policies(out):
    for name, options in RUNS.items():
        NanGuard._on_device = (lambda self: True) if name == "late" else ON_DEVICE
        trainer = make(out / name, per_device_train_batch_size=2, **options)
        error = None
        try:
            trainer.train()
        except FloatingPointError as stopped:
            error = str(stopped)
        rank = trainer.args.process_index
        result = {"error": error, "log": trainer.state.log_history, "world_size": trainer.args.world_size}
        (out / f"{name}{rank}.json").write_text(json.dumps(result))
        save_file(weights(trainer), out / f"{name}{rank}.safetensors")
    NanGuard._on_device = ON_DEVICE


def evaluation(out):
    """Sets that two ranks cannot share evenly."""
    found = {}
    for count in (1, 3, 7, 9):
        for name, options in OPTIONS.items():
            trainer = tiny_trainer(tiny_config(out / "eval", **options), eval_dataset=token_rows(count, seed=1))
            found[f"{count} {name}"] = trainer.evaluate()["eval_tokens"]
    (out / f"evaluation{trainer.args.process_index}.json").write_text(json.dumps(found))


OPTIONS = {
    "drop_last": dict(dataloader_drop_last=True, per_device_eval_batch_size=2),
    "uneven": dict(accelerator_config={"even_batches": False}, per_device_eval_batch_size=2),
    "split": dict(accelerator_config={"split_batches": True}, per_device_eval_batch_size=4),
    "groups": dict(train_sampling_strategy="group_by_length", dataloader_drop_last=True),
}


def router(out):
    """The gradient of two ranks, each with its own balance."""
    recorder = GradientRecorder()
    args = tiny_config(
        out / "router", max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = tiny_trainer(args, model=moe("mixtral"), train_dataset=token_rows(4), callbacks=[recorder])
    trainer.train()
    rank = args.process_index
    save_file(recorder.gradients, out / f"router{rank}.safetensors")
    (out / f"router{rank}.json").write_text(json.dumps(trainer.state.log_history))


def sharded(out):
    """FSDP2: each rank flags what its own shards hold; the fused optimizer takes a flag beside sharded parameters."""
    from torch.distributed.fsdp import fully_shard

    model = tiny_model(1)
    fully_shard(model)
    rank = torch.distributed.get_rank()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if rank == 1:
        model.lm_head.weight.grad.to_local()[0, 0] = float("nan")
    names, flags = nonfinite_gradients(model, torch.device("cpu"))
    bad = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = [parameter.full_tensor().clone() for parameter in model.parameters()]

    def unchanged():
        return [torch.equal(old, p.full_tensor()) for old, p in zip(before, model.parameters(), strict=True)]

    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    kept = all(unchanged())
    optimizer.found_inf = torch.tensor(0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    taken = not any(unchanged())
    (out / f"sharded{rank}.json").write_text(json.dumps({"bad": bad, "kept": kept, "taken": taken}))


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for job in (policies, evaluation, router, sharded):
        job(out)
    torch.distributed.barrier()
    (out / f"done{torch.distributed.get_rank()}").write_text("")
    torch.distributed.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
