"""Does every kernel launch, and is its answer the CPU's? Each operator once per dtype and shape, launches one by one.

The first stage to look at: a launch that fails here (shared memory, clusters, architecture) fails everywhere after.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distillm_ext import distillation_loss, sample_tokens

from ..inputs import DTYPES, logits
from ..operators import OPERATORS, Operator
from ..stage import Case, Check, Skipped

SHAPES = ((3, 1001), (3, 50257), (9, 151936))
TOY_SHAPES = ((3, 1001),)
# A row of this vocabulary is shared by blocks whose counters are 64-bit atomics on each other's shared memory.
LARGE_VOCAB = 262144


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of what is allowed: rounding of bfloat16, and 0.1 % of the largest value."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    found, expected = found.double(), expected.double()
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    found, expected = found.nan_to_num(), expected.nan_to_num()
    allowed = 0.01 * expected.abs() + 1e-3 * expected.abs().amax() + 1e-6
    return float(((found - expected).abs() / allowed).amax())


def compared(check: Check, operator: Operator, rows: int, vocab: int, dtype: str) -> dict[str, Any]:
    sides = [logits(check, rows, vocab, dtype, seed=seed) for seed in (1, 2)]
    found = [x.cpu() for x in operator(*sides)]
    expected = operator(*(x.cpu() for x in sides))
    worst = max(difference(*pair) for pair in zip(found, expected, strict=True))
    return {"ok": worst <= 1, "difference / allowed": worst}


def needs_cuda(check: Check) -> None:
    if not check.cuda:
        raise Skipped("needs a CUDA device")


def graph(check: Check, first: bool) -> dict[str, Any]:
    """Captured, then replayed on other inputs. `first`: no call before, so that the kernel is loaded in the capture."""
    needs_cuda(check)
    student, teacher = (logits(check, 8, 50257, "bfloat16", seed=seed) for seed in (1, 2))
    if not first:
        distillation_loss(student, teacher, reduction="none")
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        loss = distillation_loss(student, teacher, reduction="none")
    student.copy_(logits(check, 8, 50257, "bfloat16", seed=3))
    recorded.replay()
    worst = difference(loss.cpu(), distillation_loss(student, teacher, reduction="none").cpu())
    return {"ok": worst == 0, "difference / allowed": worst}


def side_stream(check: Check) -> dict[str, Any]:
    needs_cuda(check)
    student, teacher = (logits(check, 64, 50257, "bfloat16", seed=seed) for seed in (1, 2))
    expected, stream = distillation_loss(student, teacher), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = distillation_loss(student, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    return {"ok": bool(torch.equal(found, expected))}


def top_p(check: Check, vocab: int) -> dict[str, Any]:
    rows = logits(check, 3, vocab, "float32")
    draw = partial(sample_tokens, top_p=0.9, position=0)
    found = draw(rows, seed=torch.arange(3, device=rows.device)).tokens.cpu()
    return {"ok": bool(torch.equal(found, draw(rows.cpu(), seed=torch.arange(3)).tokens))}


def addmm_in_place(check: Check) -> dict[str, Any]:
    """Whether a float32 sum takes a bfloat16 product in place, as gradients of a head's weight would want it."""
    needs_cuda(check)
    left, right = logits(check, 4096, 512, "bfloat16"), logits(check, 512, 4096, "bfloat16", seed=1)
    total = torch.ones(4096, 4096, device=check.device)
    expected = total + left.float() @ right.float()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ok": difference(total, expected) <= 1, "extra MiB": extra}


def cases(check: Check) -> Iterator[Case]:
    for rows, vocab in SHAPES if check.cuda else TOY_SHAPES:
        for name, operator in OPERATORS.items():
            for dtype in DTYPES:
                yield f"{name} {dtype} {rows} x {vocab}", partial(compared, check, operator, rows, vocab, dtype)
    for vocab in (151936, LARGE_VOCAB):
        yield f"top_p at {vocab}", partial(top_p, check, vocab)
    yield "addmm in place", partial(addmm_in_place, check)


def run(check: Check) -> None:
    """Launches that wait for each other name the kernel that failed, but hide what streams and graphs do wrong."""
    check.cases((f"graph, first {first}", partial(graph, check, first)) for first in (True, False))
    check.cases([("side stream", partial(side_stream, check))])
    if check.cuda and "CUDA_LAUNCH_BLOCKING" not in os.environ:
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # read where a process begins to use the device
        check.begin_anew()
    check.cases(cases(check))
