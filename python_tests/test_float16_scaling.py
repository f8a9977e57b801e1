"""Gradients in float16: what a loss scaler multiplies by later must not have been rounded away before."""

import pytest
import torch
from divergence_cases import logits, oracle

from distillm_ext import TeacherHead, compress_logits, distillation_loss, linear_distillation_loss

SCALE = 65536.0  # a gradient scaler's first one
ROWS, VOCAB, HIDDEN = 256, 4000, 32


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("options", [{}, {"num_items": 10**6}, {"weight": True, "reduction": "sum"}])
@pytest.mark.parametrize("kind", ["dense", "inplace", "compressed"])
def test_logits(kind, options):
    leaf = logits(ROWS, VOCAB, torch.float16, 1).requires_grad_()
    teacher = logits(ROWS, VOCAB, torch.float16, 2)
    options = dict(options)
    divisor = options.get("num_items", ROWS)
    if options.get("weight"):
        options["weight"] = torch.full((ROWS,), 1 / ROWS)
    target = compress_logits(teacher, VOCAB) if kind == "compressed" else teacher
    student = leaf * 1 if kind == "inplace" else leaf
    loss = distillation_loss(student, target, divergence="forward_kl", inplace=kind == "inplace", **options)
    (loss * SCALE).backward()
    _, expected = oracle(leaf, teacher, torch.full((ROWS,), SCALE / divisor), divergence="forward_kl")
    assert error(leaf.grad, expected) < 2e-3


def test_rows_that_do_not_count():
    student, teacher = (logits(4, 50, torch.float16, seed) for seed in (1, 2))
    student[1], teacher[2] = torch.nan, torch.nan
    weight, labels = torch.tensor([1.0, 1.0, 0.0, 3.0]), torch.tensor([0, -100, 1, 2])
    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels, weight=weight)
    loss.backward()
    wide = student.detach()[[0, 3]].float().requires_grad_()
    expected = distillation_loss(wide, teacher[[0, 3]].float(), weight=weight[[0, 3]])
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-5, atol=0)
    assert (student.grad[1:3] == 0).all() and student.grad.isfinite().all()
    weight[0] = torch.nan
    value = distillation_loss(student, teacher, labels, weight=weight, reduction="none")
    assert value.isnan().tolist() == [True, False, False, False]


def test_sums_over_rows_beyond_the_range():
    """The weight's gradient of all rows together exceeds the largest float16; their mean does not."""
    rows, hidden = 4096, torch.full((4096, 2), 60.0, dtype=torch.float16)
    weight = torch.tensor([[0.0, 0.0], [0.2, 0.2], [-0.2, -0.2]], dtype=torch.float16).requires_grad_()
    teacher = torch.tensor([8.0, -8.0, -8.0], dtype=torch.float16).expand(rows, 3)
    linear_distillation_loss(hidden, weight, teacher, divergence="forward_kl").backward()
    expected = torch.tensor([[-60.0, -60.0], [60.0, 60.0], [0.0, 0.0]])
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_items": 10**6}, {"reduction": "none"}])
def test_heads(autocast, options):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator) / 4
    bias = torch.randn(VOCAB, generator=generator)
    inputs = [x if autocast else x.half() for x in (hidden, weight, bias)]
    # The teacher is near: what is left of the gradient is small.
    teacher = TeacherHead(inputs[0] + 0.1, inputs[1].clone())
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = linear_distillation_loss(
            *leaves[:2], teacher, student_bias=leaves[2], divergence="forward_kl", chunk_rows=100, **options
        )
        (loss.sum() / (ROWS if loss.dim() else 1) * SCALE).backward()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = TeacherHead(teacher.hidden.double(), teacher.weight.double())
    options = {key: value for key, value in options.items() if key != "reduction"}
    linear_distillation_loss(*exact[:2], wide, student_bias=exact[2], divergence="forward_kl", **options).backward()
    for found, expected in zip(leaves, exact, strict=True):
        assert found.grad.dtype == found.dtype
        assert error(found.grad, expected.grad * SCALE) < 2e-2
