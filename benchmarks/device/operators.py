"""Every operator as a call on logits: what smoke compares with the CPU and the sanitizer watches.

Each takes student and teacher logits [rows, V] of one device and returns tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distillm_ext import DIVERGENCES, compress_logits, distillation_loss, linear_distillation_loss, sample_tokens
from distillm_ext.ops.divergence import CROSS_ENTROPY, RowSides
from distillm_ext.ops.divergence import divergence as divergence_op

Operator = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
K = 16
# The member without a default.
ALPHA = {"interpolated": 0.4}


def labels_of(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[0], device=logits.device) % logits.shape[1]


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """[rows], against a teacher one entry wide."""
    cap = student.new_zeros(student.shape[0], dtype=torch.float32)
    nobody = student.new_zeros(student.shape[0], 1)
    return divergence_op(student, nobody, RowSides(labels, cap=cap), CROSS_ENTROPY)[0]


def _with_gradient(student: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Losses [rows], and the gradient under row weights that are not 1, so that it is scaled."""
    leaf = student.detach().clone().requires_grad_()
    losses = loss(leaf)
    weights = 1 + torch.arange(len(losses), device=losses.device, dtype=losses.dtype) / 4
    return losses.detach(), torch.autograd.grad(losses, leaf, weights)[0]


def _divergence(student: Tensor, teacher: Tensor, *, name: str) -> tuple[Tensor, ...]:
    metrics = []

    def loss(leaf: Tensor) -> Tensor:
        losses, found = distillation_loss(
            leaf, teacher, divergence=name, alpha=ALPHA.get(name), temperature=1.7, reduction="none",
            return_metrics=True,
        )  # fmt: skip
        metrics.extend(vars(found).values())
        return losses

    return *_with_gradient(student, loss), *metrics


def _inplace(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return _with_gradient(student, lambda leaf: distillation_loss(leaf * 1, teacher, inplace=True, reduction="none"))


def _cross_entropy(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    return _with_gradient(student, lambda leaf: cross_entropy(leaf, labels_of(leaf)))


def _topk(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    found = compress_logits(teacher, K, temperatures=(1.0, 2.0), labels=labels_of(teacher))
    return found.ids, found.logprobs, found.log_norm, found.tail_logprob


def _drawn(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Without the draws: one may fall on either side of a boundary by rounding alone."""
    position = torch.arange(teacher.shape[0], device=teacher.device)
    return (compress_logits(teacher, K, method="sample", position=position).log_norm,)


def _packed(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    found = compress_logits(teacher, K)
    return (found.unpack(found.pack("exact"), codec="exact", k=K, vocab_size=teacher.shape[1]).logprobs,)


def _sparse(student: Tensor, teacher: Tensor, *, method: str) -> tuple[Tensor, ...]:
    """From the CPU's compressed teacher, so that all devices see the same entries."""
    drawn = method == "sample"
    position = torch.arange(teacher.shape[0]) if drawn else None
    target = compress_logits(teacher.cpu(), K, method=method, position=position)
    options = {"tail": "sampled", "divergence": "forward_kl"} if drawn else {}
    return _with_gradient(
        student, lambda leaf: distillation_loss(leaf, target.to(student.device), reduction="none", **options)
    )


def _sampled(student: Tensor, teacher: Tensor, **rule: float) -> tuple[Tensor, ...]:
    seed = torch.arange(student.shape[0], device=student.device)
    found = sample_tokens(student, seed=seed, position=0, **rule)
    return found.tokens, found.logprobs, found.filtered_logprobs


def _linear(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Through a head of 97 tokens: the first columns of the logits serve as hidden states."""
    weight = torch.randn(97, 64, generator=torch.Generator().manual_seed(1)).to(student) / 8
    hidden, weight = (x.detach().clone().requires_grad_() for x in (student[:, :64], weight))
    loss = linear_distillation_loss(hidden, weight, teacher[:, :97], chunk_rows=2)
    return loss.detach(), *torch.autograd.grad(2 * loss, (hidden, weight))


OPERATORS: dict[str, Operator] = {
    **{name: partial(_divergence, name=name) for name in DIVERGENCES},
    "inplace": _inplace,
    "cross_entropy": _cross_entropy,
    "topk_logits": _topk,
    "sample_logits": _drawn,
    "pack_logits": _packed,
    "sparse_divergence": partial(_sparse, method="topk"),
    "sparse_divergence sampled": partial(_sparse, method="sample"),
    "sample_tokens": _sampled,
    "sample_tokens top_k top_p": partial(_sampled, temperature=0.8, top_k=50, top_p=0.9),
    "sample_tokens top_p": partial(_sampled, top_p=0.9),
    "linear_divergence": _linear,
}
