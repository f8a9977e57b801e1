"""What a tool watches: every operator on small inputs, or one of them a few times. Not a stage.

python -m device.watched every SECONDS              # for compute-sanitizer
python -m device.watched skew_kl 2048 128256        # for ncu
"""

from __future__ import annotations

import faulthandler
import sys
import time

import torch

from distillm_ext import compress_logits, distillation_loss

from .inputs import DTYPES, logits
from .operators import OPERATORS
from .stage import Check

VOCABULARIES = (1001, 4099, 50257)
ROWS = 3
CALLS = 4
LIMIT_SECONDS = 30


def every(check: Check, seconds: float) -> None:
    """As many operators as the time allows, small vocabularies first; says how many."""
    begun = time.monotonic()
    cases = [(v, d, name) for v in VOCABULARIES for d in DTYPES for name in OPERATORS]
    done = 0
    for vocab, dtype, name in cases:
        if time.monotonic() - begun > seconds:
            break
        student, teacher = (logits(check, ROWS, vocab, dtype, seed=seed) for seed in (1, 2))
        OPERATORS[name](student, teacher)
        done += 1
    if check.cuda:
        torch.cuda.synchronize()
    print(f"watched {done} of {len(cases)} cases", flush=True)


def one(check: Check, name: str, rows: int, vocab: int) -> None:
    sides = [logits(check, rows, vocab, "bfloat16", seed=seed) for seed in (1, 2)]
    for _ in range(CALLS):
        if name == "topk_logits":
            compress_logits(sides[1], 64)
        else:
            student = sides[0].detach().requires_grad_()
            torch.autograd.grad(distillation_loss(student, sides[1], divergence=name), student)
    if check.cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)  # a tool that is ended leaves its program running
    if sys.argv[1] == "every":
        every(Check.from_environment(), float(sys.argv[2]))
    else:
        one(Check.from_environment(), sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
