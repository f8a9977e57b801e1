"""Which gradients and weights of a model hold NaN or inf."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def nonfinite_gradients(model: torch.nn.Module, device: torch.device) -> tuple[list[str], Tensor | None]:
    """`nonfinite` of a model's gradients: one read of each, of the local part where it is sharded."""
    return nonfinite(
        ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None), device
    )


def nonfinite(named: Iterable[tuple[str, Tensor]], device: torch.device) -> tuple[list[str], Tensor | None]:
    """→ (names, [names] bool on `device`: whether the tensor of that name holds NaN or inf). The host does not wait.

    Tensors that are empty or hold integers are left out; None where none is left.
    """
    kinds: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        local: Any = tensor.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        local = local.coalesce().values() if local.is_sparse else local
        if local.numel() and local.is_floating_point():
            kinds.setdefault((local.device, local.dtype), []).append((name.removeprefix("module."), local))
    names, flags = [], []
    for members in kinds.values():
        # The largest magnitude of each tensor, in one kernel for all; a NaN is larger than any.
        norms = torch._foreach_norm([tensor for _, tensor in members], float("inf"))
        flags.append((~torch.isfinite(torch.stack(list(norms)))).to(device, non_blocking=True))
        names += [name for name, _ in members]
    return names, torch.cat(flags) if flags else None


def nonfinite_weights(model: nn.Module, accelerator: Any) -> tuple[list[str], bool]:
    """→ (parameters that hold NaN or inf on this process, whether any process has one); every process calls it.

    Args:
        model: the student, wrapped or not.
        accelerator: of the run.
    """
    named, flags = nonfinite(accelerator.unwrap_model(model).named_parameters(), accelerator.device)
    bad = [] if flags is None else flags.tolist()
    names = [name for name, flag in zip(named, bad, strict=True) if flag]
    count = torch.tensor(float(len(names)), device=accelerator.device)
    return names, bool(accelerator.reduce(count, reduction="sum") > 0)


def check_weights(model: nn.Module, accelerator: Any, step: int) -> None:
    """Every process; before anything is saved.

    Raises:
        FloatingPointError: weights of the student are NaN or inf.
    """
    names, broken = nonfinite_weights(model, accelerator)
    if broken:
        named = f"{names[0]}, {len(names)} in all" if names else "on another process"
        raise FloatingPointError(
            f"step {step}: weights of the student are NaN or inf ({named}); nothing is saved. Go on from an earlier "
            "checkpoint, with a smaller learning_rate"
        )
