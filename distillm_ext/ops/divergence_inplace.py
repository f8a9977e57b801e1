"""Operator `divergence_`: the gradient takes the place of the student's logits. Typed call, fake, autograd (eager)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .divergence import DivergenceOptions, refuse_second_derivative, row_outputs


def divergence_inplace(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    alpha_rows: Tensor | None,
    cap: Tensor | None,
    options: DivergenceOptions,
    *,
    vocab_size: int = 0,
    need_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `divergence`, with the gradient written over `student`, which must have stride 1 along the vocabulary.

    Whatever saved the logits for its own backward pass (a soft-cap, say) is told by autograd that they are gone.
    """
    arguments = (
        teacher, labels, weight, alpha_rows, cap, options.divergence, options.alpha, options.beta, options.temperature,
        options.ce_weight, options.ignore_index, options.detach_mixture, vocab_size, need_metrics,
    )  # fmt: skip
    return overwrite(torch.ops.distillm_ext.divergence_, student, arguments)


def overwrite(
    operator: Callable[..., tuple[Tensor, Tensor]], student: Tensor, arguments: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Losses and metrics of an operator that writes its gradient over `student`, its first argument."""
    return _InPlace.apply(student, operator, arguments)


class _InPlace(torch.autograd.Function):
    """Backward hands on the memory of the logits, which holds the gradient since the forward pass.

    The operator runs on a detached alias. It shares the version counter of the logits, so that autograd notices when
    another backward pass needs what has been overwritten; and it is saved after the operator ran, so that autograd
    notices when somebody changes the gradient before it is used. Marking the logits as changed instead would rebase
    the history of the tensors that they are a view of, and cost a copy there.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, operator: Callable[..., tuple[Tensor, Tensor]], arguments: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        gradient = student.detach()
        loss, metrics = operator(gradient, *arguments)
        torch.autograd.graph.increment_version(gradient)  # operators of the stable ABI leave that to the caller
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics)
        ctx.save_for_backward(gradient)
        ctx.used = False
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None
        refuse_second_derivative()
        if ctx.used:
            raise RuntimeError(
                "the backward pass of a loss with inplace=True runs once: its gradient is handed on, not kept; use "
                "inplace=False to call backward again."
            )
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        torch.ops.distillm_ext.scale_rows_(gradient, grad_loss.contiguous())
        return gradient, None, None


@torch.library.register_fake("distillm_ext::divergence_")
def _divergence_inplace_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return row_outputs(student, need_metrics=arguments[-1])
