"""The ceilings of this card: a copy from memory to memory, and a large product of bfloat16 matrices."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import clock
from ..inputs import clipped
from ..stage import Check

COPY_BYTES, TOY_COPY_BYTES = 4 * 10**9, 10**7
PRODUCT, TOY_PRODUCT = 8192, 256


def copied(check: Check) -> dict[str, Any]:
    """Counting what is read and what is written."""
    size = COPY_BYTES if check.cuda else TOY_COPY_BYTES
    source = torch.randn(size // 4, device=check.device)
    target = torch.empty_like(source)
    ms, how = clock.milliseconds([lambda: target.copy_(source)], check.device, graph=False)
    return {"ms": ms, "TB/s": 2 * size / ms / 1e9, "how": how}


def product(check: Check) -> dict[str, Any]:
    """On random data: on zeros a card runs faster."""
    n = PRODUCT if check.cuda else TOY_PRODUCT
    left, right = (torch.randn(n, n, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    ms, how = clock.milliseconds([lambda: left @ right], check.device, graph=False)
    return {"ms": ms, "TFLOP/s": 2 * n**3 / ms / 1e9, "how": how}


def run(check: Check) -> None:
    check.cases(
        [("copy", clipped(partial(copied, check), check)), ("product", clipped(partial(product, check), check))]
    )
