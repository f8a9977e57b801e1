"""Linear layers of a model on the CPU take `few_rows_linear` while it decodes.

A decoding step multiplies a handful of rows with every weight. A general matrix product repacks the weight for that,
which costs more than the product; the kernel streams it once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from distillm_ext.ops.few_rows_linear import few_rows_linear

# Measured at a decoding step of a 135 M model: from here on a general product is as fast.
MOST_ROWS = 16


def _takes_kernel(module: nn.Linear) -> bool:
    """A plain linear layer whose weight is here, whole, on the CPU and in a dtype of the kernel."""
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return False
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    return all(
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and tensor.dtype == module.weight.dtype
        for tensor in tensors
    )


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // max(x.shape[-1], 1)
        if rows > MOST_ROWS or x.dtype != module.weight.dtype:
            return nn.functional.linear(x, module.weight, module.bias)
        found = few_rows_linear(x.reshape(rows, x.shape[-1]), module.weight, module.bias)
        return found.view(*x.shape[:-1], found.shape[-1])

    return forward


@contextlib.contextmanager
def few_rows_linears(model: nn.Module) -> Iterator[None]:
    """Inside, the model's plain linear layers on the CPU use the kernel for up to `MOST_ROWS` rows.

    Only without gradient. Under autocast the layers stay as they are: it chooses the dtype of their products.
    """
    replaced: list[nn.Linear] = []
    if not torch.is_autocast_enabled("cpu"):
        replaced = [m for m in model.modules() if isinstance(m, nn.Linear) and _takes_kernel(m)]
    for module in replaced:
        module.__dict__["forward"] = _forward(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.__dict__["forward"]
