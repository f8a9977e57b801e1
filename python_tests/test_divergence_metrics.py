"""`return_metrics=True`, `vocab_size` and rows with two strides: what the operator does beside loss and gradient."""

import pytest
import torch
from divergence_cases import DTYPES, logits, required

from distillm_ext import distillation_loss
from distillm_ext.containers import DivergenceMetrics
from distillm_ext.functional import DIVERGENCES


def expected_metrics(student, teacher, temperature=1.0):
    entropies = []
    for x in (teacher, student):
        log = (x.double() / temperature).log_softmax(-1)
        entropies.append(-(log.exp() * log.masked_fill(log == -torch.inf, 0)).sum(-1))
    width = max(student.shape[-1], teacher.shape[-1])
    padded = (torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-torch.inf) for x in (student, teacher))
    first = [x.double().argmax(-1) for x in padded]  # the first of equal ones
    return *entropies, (first[0] == first[1]).double()


def check(metrics, expected, dtype):
    assert isinstance(metrics, DivergenceMetrics)
    found = (metrics.teacher_entropy, metrics.student_entropy, metrics.top1_agreement)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not value.requires_grad
        tolerance = 1e-11 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(divergence, dtype):
    student, teacher = logits(8, 1500, dtype, 1), logits(8, 1500, dtype, 2)
    student[:4, 1400] = teacher[:4, 1400] = 40.0
    student[0, 17] = 40.0  # as large, and earlier
    options = required(dict(divergence=divergence, temperature=1.7, reduction="none"))
    plain = distillation_loss(student, teacher, **options)
    loss, metrics = distillation_loss(student, teacher, return_metrics=True, **options)
    assert torch.equal(loss, plain)
    check(metrics, expected_metrics(student, teacher, 1.7), dtype)
    assert metrics.top1_agreement[:4].tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("widths", ((1500, 900), (900, 1500), (5, 3)))
def test_masks_and_unequal_vocabularies(widths):
    student, teacher = logits(3, widths[0], torch.float32, 1), logits(3, widths[1], torch.float32, 2)
    student[1, : widths[0] - 2] = -torch.inf
    teacher[2, 1:] = -torch.inf  # entropy 0
    _, metrics = distillation_loss(student, teacher, return_metrics=True)
    check(metrics, expected_metrics(student, teacher), torch.float32)
    assert metrics.teacher_entropy[2] == 0 and not metrics.teacher_entropy[2].signbit()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_masks_by_the_lowest_finite_number_and_rising_logits(dtype):
    """The first tiles are lighter than all that follow, beyond what an exponent of two can say."""
    student, teacher = logits(2, 5000, dtype, 1), logits(2, 5000, dtype, 2)
    student[:, :2048] = torch.finfo(dtype).min
    teacher += torch.linspace(-300, 300, 5000).to(dtype)
    _, metrics = distillation_loss(student, teacher, return_metrics=True)
    check(metrics, expected_metrics(student, teacher), dtype)


def test_gradient_is_the_same_and_shapes_follow_the_positions():
    student, teacher = logits(6, 40, torch.float32, 1).view(2, 3, 40), logits(6, 40, torch.float32, 2).view(2, 3, 40)
    gradients = []
    for return_metrics in (False, True):
        leaf = student.clone().requires_grad_()
        result = distillation_loss(leaf, teacher, return_metrics=return_metrics)
        (result[0] if return_metrics else result).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert result[1].teacher_entropy.shape == result[1].top1_agreement.shape == (2, 3)
    inplace = distillation_loss(student.clone().requires_grad_() * 1, teacher, inplace=True, return_metrics=True)
    check(inplace[1], expected_metrics(student, teacher), torch.float32)


def test_rows_left_out_read_0_and_broken_rows_nan():
    student, teacher = logits(5, 40, torch.float32, 1), logits(5, 40, torch.float32, 2)
    labels, weight = torch.tensor([1, -100, 2, 3, 4]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    student[1] = student[3] = torch.nan
    _, metrics = distillation_loss(student, teacher, labels, weight=weight, return_metrics=True)
    for values in (metrics.teacher_entropy, metrics.student_entropy, metrics.top1_agreement):
        assert values[1:3].tolist() == [0, 0] and values[3].isnan() and values[[0, 4]].isfinite().all()
    empty = distillation_loss(student[:0], teacher[:0], return_metrics=True)[1]
    assert empty.student_entropy.shape == (0,)


def test_compile_returns_them():
    student, teacher = logits(4, 60, torch.float32, 1).requires_grad_(), logits(4, 60, torch.float32, 2)

    def step(student, teacher):
        loss, metrics = distillation_loss(student * 2, teacher, return_metrics=True)
        return loss, metrics.teacher_entropy, metrics.student_entropy, metrics.top1_agreement

    found = torch.compile(step, fullgraph=True)(student, teacher)
    torch.testing.assert_close(found, step(student, teacher))
    (gradient,) = torch.autograd.grad(found[0], student)
    torch.testing.assert_close(gradient, torch.autograd.grad(step(student, teacher)[0], student)[0])


# ---- vocab_size and row blocks


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vocab_size", (1, 1024, 1500))
def test_vocab_size_equals_slicing(dtype, vocab_size):
    student, teacher = logits(3, 1500, dtype, 1), logits(3, 1700, dtype, 2)
    labels = torch.zeros(3, dtype=torch.int64)
    results = []
    for cut in (False, True):
        leaf = student.clone().requires_grad_()
        sides = (leaf[:, :vocab_size], teacher[:, :vocab_size]) if cut else (leaf, teacher)
        limit = None if cut else vocab_size
        loss = distillation_loss(*sides, labels, divergence="forward_kl", ce_weight=0.5, temperature=2.0,
                                 reduction="none", vocab_size=limit)  # fmt: skip
        loss.backward(torch.tensor([1.0, 2.0, -1.0]))
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_vocab_size_and_row_blocks_cost_no_copy():
    student = torch.randn(4, 33, 2000, requires_grad=True)
    teacher, labels = torch.randn(4, 33, 2100), torch.zeros(4, 33, dtype=torch.int64)
    views = student[:, :-1], teacher[:, 1:], labels[:, 1:]
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = distillation_loss(*views, vocab_size=1900)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated <= views[0].numel() * 4 + 2**16
    loss.backward()
    expected = distillation_loss(*(x.reshape(128, *x.shape[2:]) for x in views), vocab_size=1900)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(expected, student)[0], student.grad)


BLOCKS = {
    "next position": lambda x: x[:, 1:],
    "one block": lambda x: x[1:2, 2:4],
    "one row per block": lambda x: x[:, 2:3],
    "every other block and row": lambda x: x[::2, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_row_blocks(name):
    take = BLOCKS[name]
    student, teacher = take(torch.randn(4, 5, 70)), take(torch.randn(4, 5, 70))
    upstream = torch.rand(student.shape[:2])
    results = []
    for copied in (False, True):
        leaf = (student.clone() if copied else student).detach().requires_grad_()
        loss = distillation_loss(leaf, teacher.clone() if copied else teacher, reduction="none")
        loss.backward(upstream)
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
