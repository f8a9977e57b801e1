"""Generates on two processes, under FSDP2 and under DDP; results are files.

forks.run("generation_worker", OUT, processes=2)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_decode import make, prompts
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distillm_ext.generation import SamplingParams, generate

# Prompt lengths and most new tokens of each rank.
CASES = {
    "even": (([3, 5], [4, 6]), ([5, 3], [6, 4])),
    "fewer_prompts": (([3, 5, 2, 7, 1], [4, 6, 3, 1, 5]), ([5], [2])),
    "no_prompts": (([], []), ([4, 2, 6], [3, 7, 1])),
}
WRAPPERS = {"fsdp2": "llama", "fsdp2_hybrid": "lfm2", "ddp": "llama"}


def world_prompts(case, rank):
    """→ input_ids, attention_mask, options of `generate`."""
    lengths, limits = CASES[case][rank]
    options = dict(max_new_tokens=limits, eos_token_ids=(9,), batch_size=2)
    if not lengths:
        return torch.zeros(0, 3, dtype=torch.long), None, options
    return *prompts(lengths, seed=rank), options


def wrapped(name):
    model = make(WRAPPERS[name])
    if name == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def main():
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, report = dist.get_rank(), {}
    for name in WRAPPERS:
        model = wrapped(name)
        inner = model.module if name == "ddp" else model
        passes = []
        inner.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        report[name] = {}
        for case in CASES:
            ids, mask, options = world_prompts(case, rank)
            found = generate(model, ids, mask, SamplingParams(), range(len(ids)), **options)
            report[name][case] = {"tokens": found.tokens.tolist(), "passes": len(passes)}
            passes.clear()
            dist.barrier()
    temporary = out / f"rank{rank}.tmp"
    temporary.write_text(json.dumps(report))
    temporary.rename(out / f"rank{rank}.json")
    # Everything is written. gloo may abort while it is torn down, which is no longer part of the test.
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
