"""Liger-Kernel's divergence losses over our kernels.

They take log-probabilities of the student, whatever made them: nothing is normalised, and the gradient is that by each
log-probability as a variable of its own, as theirs is: what a log-softmax before it does to the gradient is left to its
own backward pass. One pass reads both sides and writes the gradient. (Where the student's logits are at hand,
`distillation_loss` saves the log-softmax and its backward pass.)

Where theirs has no number, 0 log 0 of two entries without probability, ours counts 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.logits import deferred_weight
from ..checks.options import checked_number, checked_options
from ..ops.divergence import loss_dtype
from ..ops.extension import require_backend
from ..ops.logprob_divergence import logprob_divergence
from .entries import kl_entries

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def liger_jsd(
    input: Tensor, target: Tensor, shift_labels: Tensor | None = None, beta: float = 0.5, ignore_index: int = -100
) -> Tensor:
    """Generalized JSD of log-probabilities: sum beta p log(p/m) + (1 - beta) q log(q/m), m = beta p + (1 - beta) q.

    q = exp(input), p = exp(target). beta = 0 is KL(p || q), beta = 1 is KL(q || p).

    Args:
        input: [BT, V] log-probabilities of the student, float32, bfloat16 or float16 (float64 on the CPU).
        target: [BT, V] log-probabilities of the teacher, without gradient.
        shift_labels: [BT], integer; rows equal to `ignore_index` are not read. Mean over the others, or over BT.
        beta: weight of the teacher, in [0, 1].

    Returns:
        A scalar in the dtype of `input`; 0 where no row counts.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Example:
        >>> log_q = torch.randn(8, 100, requires_grad=True).log_softmax(-1)
        >>> liger_jsd(log_q, torch.randn(8, 100).log_softmax(-1), beta=0.1).backward()
    """
    input, target, dtype = *_checked_pair(input, target), input.dtype
    options = checked_options("generalized_js", None, beta, 1.0, 0.0, ignore_index, False)
    if shift_labels is None:
        weight = _equal_weight(input, input.shape[0])
    else:
        counted = _checked_labels(shift_labels, input) != ignore_index
        weight = counted.to(loss_dtype(input.dtype)) / counted.sum().clamp(min=1)
    return _loss(input, target, weight, options.divergence, beta=options.beta).to(dtype)


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """KL divergence of probabilities p from log-probabilities: sum p (log max(p, eps) - input).

    Args:
        input: [BT, V] log-probabilities of the student, float32, bfloat16 or float16 (float64 on the CPU).
        target: [BT, V] probabilities p of the teacher, without gradient; with `log_target` their logarithms, and then
            `eps` has no part.
        size_average, reduce: unused, as there.
        reduction: "batchmean" (over BT), "sum", or "mean" (over BT V). "none": the summands, [BT, V]. No kernel serves
            that: it is a formula of PyTorch operations, which with their backward pass read or write a tensor of the
            inputs' size about 27 times (the other reductions: 3), in float32.
        eps: what the logarithm of a smaller probability is taken of.

    Returns:
        A scalar, or [BT, V]; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Example:
        >>> log_q = torch.randn(8, 100, requires_grad=True).log_softmax(-1)
        >>> liger_kl_div(log_q, torch.randn(8, 100).softmax(-1), reduction="batchmean").backward()
    """
    if reduction not in ("batchmean", "sum", "mean", "none"):
        raise ValueError(f"reduction must be 'batchmean', 'sum', 'mean' or 'none', got {reduction!r}.")
    input, target = _checked_pair(input, target)
    eps = checked_number(eps, "eps")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}.")
    if reduction == "none":
        x, y = (side.to(loss_dtype(input.dtype)) for side in (input, target.detach()))
        return kl_entries(y.exp(), y, x) if log_target else kl_entries(y, y.clamp(min=eps).log(), x)
    rows, vocab = input.shape
    weight = _equal_weight(input, {"batchmean": rows, "sum": 1, "mean": rows * vocab}[reduction])
    return _loss(input, target, weight, "forward_kl", probability_floor=None if log_target else eps)


class LigerJSD(nn.Module):
    """`liger_jsd` as a module."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


class LigerKLDIVLoss(nn.KLDivLoss):
    """`liger_kl_div` as a module, with the arguments of `torch.nn.KLDivLoss` after `eps`."""

    def __init__(self, eps: float = 1e-10, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target, eps=self.eps)


class LigerJSDFunction:
    """`liger_jsd` by the name of their autograd function."""

    apply = staticmethod(liger_jsd)


class LigerKLDivLossFunction:
    """`liger_kl_div` by the name of their autograd function, with its arguments."""

    @staticmethod
    def apply(
        y_pred: Tensor, y_true: Tensor, reduction: str = "batchmean", log_target: bool = False, eps: float = 1e-10
    ) -> Tensor:
        return liger_kl_div(y_pred, y_true, reduction=reduction, log_target=log_target, eps=eps)


def _loss(input: Tensor, target: Tensor, weight: Tensor, divergence: str, **options: Any) -> Tensor:
    row_weight, deferred = deferred_weight(weight, input.dtype)
    losses = logprob_divergence(input, target.detach(), row_weight, divergence, **options)
    return (losses if deferred is None else losses * deferred).sum()


def _equal_weight(input: Tensor, divisor: int) -> Tensor:
    """[BT] of 1 / divisor; a batch without rows has no divisor."""
    return torch.ones(input.shape[:1], dtype=loss_dtype(input.dtype), device=input.device) / max(divisor, 1)


def _checked_pair(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides, in float64 where one of them is."""
    for name, side in (("input", input), ("target", target)):
        if not isinstance(side, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(side).__name__}.")
        if side.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {side.dtype}.")
        if side.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {side.layout}; call to_dense().")
        if side.dim() != 2 or side.shape[1] == 0:
            raise ValueError(
                f"{name} must have shape [BT, V] with V >= 1, got {list(side.shape)}; flatten the positions with "
                f"{name}.flatten(0, -2)."
            )
    if input.shape != target.shape:
        raise ValueError(f"target must have the shape of input, {list(input.shape)}, got {list(target.shape)}.")
    if input.device != target.device:
        raise ValueError(f"target must be on the device of input, {input.device}, got {target.device}.")
    require_backend(input.device, "input")
    if torch.float64 not in (input.dtype, target.dtype):
        return input, target
    if input.device.type == "cuda":
        raise TypeError("input and target must be float32, bfloat16 or float16 on CUDA; float64 is for the CPU.")
    return input.double(), target.double()


def _checked_labels(labels: Tensor, input: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"shift_labels must be a tensor, got {type(labels).__name__}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"shift_labels must be an integer tensor, got {labels.dtype}.")
    if labels.shape != input.shape[:1]:
        raise ValueError(f"shift_labels must have shape {list(input.shape[:1])}, got {list(labels.shape)}.")
    if labels.device != input.device:
        raise ValueError(f"shift_labels must be on the device of input, {input.device}, got {labels.device}.")
    return labels
