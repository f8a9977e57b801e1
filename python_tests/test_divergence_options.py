"""Options of `distillation_loss`: masks, weights, caps, cross-entropy, reductions, unequal vocabularies."""

import pytest
import torch
from divergence_cases import (
    ALWAYS_FINITE,
    DTYPES,
    INFINITE_CASES,
    assert_close,
    logits,
    oracle,
    required,
    run,
)

from distillm_ext import distillation_loss, reference
from distillm_ext.functional import DIVERGENCES


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_ignored_rows_are_not_read(dtype):
    student, teacher = logits(4, 900, dtype, 1), logits(4, 900, dtype, 2)
    labels = torch.tensor([3, -100, 5, 6])
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0])
    student[1], teacher[2] = torch.nan, torch.nan
    value, gradient = run(student, teacher, torch.ones(4), labels=labels, weight=weight)
    assert value[1:3].tolist() == [0.0, 0.0] and (gradient[1:3] == 0).all()
    bare = run(student[[0, 3]], teacher[[0, 3]], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(value[[0, 3]], bare[0] * torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(gradient[[0, 3]], bare[1])
    mean = distillation_loss(student, teacher, labels, weight=weight)
    torch.testing.assert_close(mean, value.sum() / 3)
    custom = run(student, teacher, torch.ones(4), labels=labels.where(labels != -100, 7), weight=weight, ignore_index=7)
    torch.testing.assert_close(custom[0], value)


def test_no_valid_row_gives_zero():
    student = logits(3, 30, torch.float32).requires_grad_()
    for labels in (torch.full((3,), -100),):
        loss = distillation_loss(student, student.detach() * 2, labels)
        loss.backward()
        assert loss.item() == 0 and (student.grad == 0).all()
    assert distillation_loss(student, student.detach(), weight=torch.zeros(3)).item() == 0
    assert distillation_loss(student, student.detach() * 2, num_items=0).item() == 0


@pytest.mark.parametrize("divergence", ALWAYS_FINITE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", ((1500, 2300), (2300, 1500), (3, 4), (4, 3)))
def test_unequal_vocabularies(divergence, dtype, widths):
    student, teacher = logits(3, widths[0], dtype, 1), logits(3, widths[1], dtype, 2)
    ours = run(student, teacher, torch.ones(3), divergence=divergence)
    assert_close(*ours, *oracle(student, teacher, torch.ones(3), divergence=divergence), dtype)


def test_unequal_vocabularies_that_would_be_infinite():
    narrow, wide = logits(2, 10, torch.float32, 1), logits(2, 12, torch.float32, 2)
    cases = [(name, narrow, wide) if side == "student" else (name, wide, narrow) for name, side in INFINITE_CASES]
    for divergence, student, teacher in cases:
        with pytest.raises(ValueError, match="vocab_size=10"):
            distillation_loss(student, teacher, divergence=divergence)
        cut = distillation_loss(student, teacher, divergence=divergence, vocab_size=10)
        torch.testing.assert_close(cut, distillation_loss(student[:, :10], teacher[:, :10], divergence=divergence))
    finite = oracle(narrow, wide, torch.ones(2), divergence="reverse_kl")
    assert_close(*run(narrow, wide, torch.ones(2), divergence="reverse_kl"), *finite, torch.float32)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("temperature", (1.0, 3.0))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cross_entropy_of_the_same_pass(dtype, temperature, divergence):
    student, teacher = logits(5, 1300, dtype, 1), logits(5, 1300, dtype, 2)
    labels = torch.tensor([0, 1299, -100, 1024, 77])
    upstream = torch.tensor([1.0, 0.5, 1.0, 2.0, -1.0])
    ours = run(student, teacher, upstream, labels=labels, divergence=divergence, temperature=temperature, ce_weight=0.7)
    leaf = student.double().requires_grad_()
    options = required(dict(divergence=divergence, temperature=temperature))
    divergences = reference.per_token_divergence(leaf, teacher.double(), **options)
    ce = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    expected = torch.where(labels == -100, 0.0, divergences + 0.7 * ce)
    (expected * upstream).sum().backward()
    gradient = leaf.grad
    keep = labels != -100
    assert_close(ours[0][keep], ours[1][keep], expected.detach()[keep], gradient[keep], dtype)
    assert ours[0][2] == 0 and (ours[1][2] == 0).all()


def test_label_outside_the_vocabulary_spoils_its_row_only():
    student, teacher = logits(3, 20, torch.float32, 1), logits(3, 20, torch.float32, 2)
    for bad in (20, -1, 2**40):
        value, gradient = run(student, teacher, torch.ones(3), labels=torch.tensor([1, bad, 2]), ce_weight=1.0)
        assert value.isnan().tolist() == [False, True, False] and gradient[1].isnan().all()


@pytest.mark.parametrize("tensor", (False, True))
def test_cap(tensor):
    student, teacher = logits(4, 50, torch.float32, 1), logits(4, 50, torch.float32, 2)
    student[2] = teacher[2] + 0.01
    free = run(student, teacher, torch.ones(4))
    limit = 0.5
    assert (free[0] > limit).tolist() == [True, True, False, True]
    cap = torch.full((4,), limit) if tensor else limit
    value, gradient = run(student, teacher, torch.ones(4), cap=cap)
    torch.testing.assert_close(value, free[0].clamp(max=limit))
    assert (gradient[[0, 1, 3]] == 0).all()
    torch.testing.assert_close(gradient[2], free[1][2])


def test_reductions_and_num_items():
    student, teacher = logits(6, 40, torch.float32, 1).view(2, 3, 40), logits(6, 40, torch.float32, 2).view(2, 3, 40)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    rows = distillation_loss(student, teacher, labels, reduction="none")
    assert rows.shape == (2, 3)
    torch.testing.assert_close(distillation_loss(student, teacher, labels, reduction="sum"), rows.sum())
    torch.testing.assert_close(distillation_loss(student, teacher, labels), rows.sum() / 4)
    for count in (10, 10.0, torch.tensor(10), torch.tensor([10.0])):
        torch.testing.assert_close(distillation_loss(student, teacher, labels, num_items=count), rows.sum() / 10)
    nan_weight = torch.tensor([[1.0, 1.0, torch.nan], [1.0, 1.0, 1.0]])
    leaf = student.detach().requires_grad_()
    distillation_loss(leaf, teacher, labels, weight=nan_weight).backward()
    assert leaf.grad[0, 2].isnan().all() and leaf.grad[1].isfinite().all() and leaf.grad[1, 0].abs().sum() > 0


def test_accumulated_micro_batches_equal_one_batch():
    student, teacher = logits(8, 30, torch.float64, 1), logits(8, 30, torch.float64, 2)
    labels = torch.tensor([1, 2, -100, 3, -100, -100, -100, 4])
    whole = student.clone().requires_grad_()
    distillation_loss(whole, teacher, labels).backward()
    parts = student.clone().requires_grad_()
    for piece in (slice(0, 4), slice(4, 8)):
        distillation_loss(parts[piece], teacher[piece], labels[piece], num_items=4).backward()
    torch.testing.assert_close(parts.grad, whole.grad)
