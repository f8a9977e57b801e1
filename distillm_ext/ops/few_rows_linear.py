"""Operator `few_rows_linear`: typed call and fake. CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension  # noqa: F401  (loads the libraries)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for x [M, K] with few rows, weight [N, K], bias [N] or None → [M, N], in the dtype of all three.

    float32 or bfloat16, accumulated in float32. A row of the result depends on that row of x alone, bit for bit. No
    gradient: for use under `torch.no_grad`.
    """
    return torch.ops.distillm_ext.few_rows_linear(x, weight, bias)


@torch.library.register_fake("distillm_ext::few_rows_linear")
def _few_rows_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
