"""The plain formula under torch.compile: the baseline to beat. What is not built in time is left out."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ..inputs import clipped
from ..stage import Case, Check
from .eager import formula, measured, sizes


def compiled(check: Check, name: str, rows: int, vocab: int) -> dict[str, Any]:
    begun = time.monotonic()
    loss = torch.compile(partial(formula, name), dynamic=False)
    values = measured(check, rows, vocab, loss)
    return {**values, "seconds with compilation": round(time.monotonic() - begun, 1)}


def cases(check: Check) -> Iterator[Case]:
    for rows, vocab in reversed(list(sizes(check))):
        for name in ("skew_kl", "forward_kl") if check.cuda else ("skew_kl",):
            yield f"compile {name} {rows} x {vocab}", clipped(partial(compiled, check, name, rows, vocab), check)


def run(check: Check) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        check.cases(cases(check))
