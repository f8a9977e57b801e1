"""Liger-Kernel's divergence losses over our kernels.

They take log-probabilities, of the student first. A log-softmax is its own logits, so values are the same; the gradient
with respect to the log-probabilities differs by a multiple of the student's probabilities, which the backward pass of
the log-softmax that made them removes: the gradient with respect to the logits is the same. (Giving logits directly
saves that log-softmax: use `distillation_loss`.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import distillation_loss


def liger_jsd(
    input: Tensor, target: Tensor, shift_labels: Tensor | None = None, beta: float = 0.5, ignore_index: int = -100
) -> Tensor:
    """Generalized JSD of log-probabilities [BT, V]; `beta` weights the teacher. Mean over the labelled rows."""
    return distillation_loss(
        input, target, shift_labels, divergence="generalized_js", beta=beta, ignore_index=ignore_index
    )


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """KL(target || input): `input` log-probabilities [BT, V] of the student, `target` probabilities of the teacher, or
    its log-probabilities with `log_target`.

    Args:
        size_average, reduce: unused, as there.
        reduction: "batchmean" (over BT), "sum", or "mean" (over BT V); "none", per entry there, is not offered.
        eps: unused; zeros need no offset here.
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(f"reduction must be 'batchmean', 'sum' or 'mean', got {reduction!r}.")
    rows = input[..., 0].numel()
    divisor = {"batchmean": rows, "sum": 1, "mean": rows * input.shape[-1]}[reduction]
    teacher = target if log_target else target.log()
    count = torch.tensor(divisor, device=input.device)
    return distillation_loss(input, teacher, divergence="forward_kl", num_items=count)


class LigerJSD(nn.Module):
    """`liger_jsd` as a module."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


class LigerKLDIVLoss(nn.KLDivLoss):
    """`liger_kl_div` as a module, with the arguments of `torch.nn.KLDivLoss`."""

    def __init__(self, eps: float = 1e-10, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target)
