"""What the tests of `linear_distillation_loss` share: both sides of a loss, fused and materialised."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillm_ext import TeacherHead, distillation_loss, linear_distillation_loss
from distillm_ext.containers import LinearHead

ROWS, VOCAB, HIDDEN = 7, 33, 12
# Largest relative error of a gradient, by the rounding of what is summed up.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """Both sides of one loss; `transform` is what stands behind the student's head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: TeacherHead | Tensor
    labels: Tensor | None
    softcap: float | None = None
    scale: float = 1.0

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def ours(self, **options: Any) -> Tensor:
        return linear_distillation_loss(
            self.hidden, self.weight, self.teacher, self.labels, student_bias=self.bias, logit_softcap=self.softcap,
            logit_scale=self.scale, **options,
        )  # fmt: skip

    def expected(self, **options: Any) -> Tensor:
        student = LinearHead(self.hidden, self.weight, self.bias, self.softcap, self.scale)
        teacher = self.teacher if isinstance(self.teacher, Tensor) else logits_of(self.teacher)
        return distillation_loss(logits_of(student), teacher, self.labels, **options)


def logits_of(head: LinearHead) -> Tensor:
    """As a model forms them: head, scale, softcap."""
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap


def make_case(
    dtype: torch.dtype = torch.float32, *, shape: tuple[int, ...] = (ROWS,), bias: bool = True, vocab: int = VOCAB,
    teacher_vocab: int = VOCAB, labels: bool = True, seed: int = 0, **transform: Any,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(min(vocab, teacher_vocab), shape, generator=generator)
    target.view(-1)[::3] = -100
    return Case(
        random(*shape, HIDDEN).requires_grad_(), random(vocab, HIDDEN).requires_grad_(),
        random(vocab).requires_grad_() if bias else None,
        TeacherHead(random(*shape, 20), random(teacher_vocab, 20), random(teacher_vocab) if bias else None),
        target if labels else None, **transform,
    )  # fmt: skip


def value_and_gradients(loss: Tensor, case: Case, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    return loss.detach(), list(torch.autograd.grad(loss, case.leaves(), upstream))


def assert_same(case: Case, upstream: Tensor | None = None, chunk_rows: int | None = None, **options: Any) -> None:
    value, gradients = value_and_gradients(case.ours(chunk_rows=chunk_rows, **options), case, upstream)
    expected, expected_gradients = value_and_gradients(case.expected(**options), case, upstream)
    dtype = case.hidden.dtype
    assert value.dtype == expected.dtype
    close(value, expected, TOLERANCE[dtype])
    for gradient, wanted, leaf in zip(gradients, expected_gradients, case.leaves(), strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape and wanted.abs().max() > 0
        close(gradient, wanted, TOLERANCE[dtype])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = expected.abs().max().item() if expected.numel() else 0.0
    # A gradient is a difference of probabilities: their rounding stays where they cancel.
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * (largest + 0.05))
