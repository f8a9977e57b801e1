"""Compressed teachers for tests of the sparse divergence: made by the reference, edited by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distillm_ext import CompressedLogits, distillation_loss
from distillm_ext.checks.compressed import SAMPLED_DIVERGENCES, SPARSE_DIVERGENCES
from distillm_ext.checks.options import TAILS
from distillm_ext.reference.compression import compress_logits_reference
from distillm_ext.reference.sparse import per_token_sparse_divergence

TEMPERATURES = (1.0, 2.5)
FORMS = [(name, tail) for name in SPARSE_DIVERGENCES for tail in TAILS if tail != "sampled"]
FORMS += [(name, "sampled") for name in SAMPLED_DIVERGENCES]


def logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def compressed(teacher: Tensor, k: int, tail: str = "bucket") -> CompressedLogits:
    """What `tail` needs of teacher logits: draws for "sampled", else the k most probable entries."""
    position = torch.arange(teacher.shape[:-1].numel()).reshape(teacher.shape[:-1])
    method = "sample" if tail == "sampled" else "topk"
    return compress_logits_reference(teacher, k, method=method, temperatures=TEMPERATURES, position=position)


def edited(teacher: CompressedLogits, **fields) -> CompressedLogits:
    return replace(teacher, **fields)


def oracle(student: Tensor, teacher: CompressedLogits, upstream: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Per-position values and the gradient for an upstream gradient, in float64."""
    student = student.detach().double().clone().requires_grad_()
    value = per_token_sparse_divergence(student, teacher, **options)
    (value * upstream.double()).sum().backward()
    return value.detach(), student.grad


def run(student: Tensor, teacher: CompressedLogits | Tensor, upstream: Tensor, labels=None, **options):
    student = student.detach().clone().requires_grad_()
    value = distillation_loss(student, teacher, labels, reduction="none", **options)
    value.backward(upstream.to(value.dtype))
    return value.detach(), student.grad


ROUNDING = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def assert_close(value, gradient, expected_value, expected_gradient, dtype) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 4e-6
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance, atol=tolerance)
    assert gradient.dtype == dtype
    largest = expected_gradient.abs().amax(-1, keepdim=True)
    absolute = 1e-14 if dtype == torch.float64 else 2e-6
    error = (gradient.double() - expected_gradient).abs()
    assert (error <= ROUNDING[dtype] * largest + absolute).all(), error.max()
