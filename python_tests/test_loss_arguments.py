"""Arguments of the losses at and beyond the ends of what they take."""

import numpy as np
import pytest
import torch
from divergence_cases import logits, run

from distillm_ext import (
    DistillationLoss,
    LinearDistillationLoss,
    TeacherHead,
    compress_logits,
    distillation_loss,
    linear_distillation_loss,
)
from distillm_ext.compat import distillm

INFINITY = float("inf")


def pair(rows=3, vocab=17):
    return logits(rows, vocab, torch.float32, 1).requires_grad_(), logits(rows, vocab, torch.float32, 2)


# ---- values of the wrong kind or out of range


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"temperature": 10**400}, ValueError, "temperature"),
        ({"ignore_index": 2**70}, ValueError, "ignore_index"),
        ({"detach_mixture": "no", "divergence": "skew_reverse_kl"}, TypeError, "detach_mixture"),
        ({"num_items": torch.tensor(True)}, TypeError, "num_items"),
        ({"num_items": torch.tensor(1j)}, TypeError, "num_items"),
        ({"divergence": "alpha_beta", "alpha": 1e-6}, ValueError, "alpha of alpha_beta"),
        ({"divergence": "alpha_beta", "alpha": 1.0, "beta": 1e-9}, ValueError, "beta of alpha_beta"),
        ({"weight": torch.ones(3).to_sparse()}, TypeError, "weight must be a dense tensor"),
    ],
)
def test_refused(options, error, message):
    student, teacher = pair()
    with pytest.raises(error, match=message):
        distillation_loss(student, teacher, **options)


def test_sparse_logits_are_refused():
    student, teacher = pair()
    with pytest.raises(TypeError, match="student_logits must be a dense tensor"):
        distillation_loss(student.detach().to_sparse(), teacher)
    with pytest.raises(TypeError, match="teacher must be a dense tensor"):
        distillation_loss(student, teacher.to_sparse())


def test_numbers_of_numpy():
    student, teacher = pair()
    found = distillation_loss(student, teacher, temperature=np.float32(2), num_items=np.int64(5))
    torch.testing.assert_close(found, distillation_loss(student, teacher, temperature=2.0, num_items=5), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"cap": torch.tensor([1.0, -1.0, 1.0])},
        {"divergence": "alpha_beta", "alpha": torch.tensor([0.2, INFINITY, 0.2])},
        {"divergence": "alpha_beta", "alpha": torch.tensor([0.2, 1e-5, 0.2])},
    ],
)
def test_bad_values_in_tensors_spoil_their_own_row(options):
    student, teacher = pair()
    value, gradient = run(student, teacher, torch.ones(3), **options)
    bad = torch.tensor([False, True, False])
    assert (value.isnan() == bad).all() and (gradient.isnan() == bad[:, None]).all()


def test_negative_num_items_in_a_tensor():
    student, teacher = pair()
    assert distillation_loss(student, teacher, num_items=torch.tensor(-2)).isnan()


def test_an_infinite_weight_leaves_the_divisor_alone():
    student, teacher = pair()
    weight = torch.tensor([1.0, INFINITY, 1.0])
    distillation_loss(student, teacher, weight=weight).backward()
    found, student.grad = student.grad, None
    distillation_loss(student[[0, 2]], teacher[[0, 2]]).backward()
    torch.testing.assert_close(found[[0, 2]], student.grad[[0, 2]])


@pytest.mark.parametrize("divergence", ["skew_kl", "interpolated", "adaptive_kl", "alpha_beta"])
def test_alpha_and_cap_for_all_positions_in_a_tensor(divergence):
    student, teacher = pair()
    found = distillation_loss(student, teacher, divergence=divergence, alpha=torch.tensor(0.3), cap=torch.tensor(1.0))
    torch.testing.assert_close(found, distillation_loss(student, teacher, divergence=divergence, alpha=0.3, cap=1.0))


# ---- a label whose logit is -inf


def with_masked_labels():
    student, teacher = (x.detach() for x in pair(4))
    labels = torch.tensor([3, 5, -100, 6])
    student[1, 5] = student[3, 6] = teacher[3, 6] = -INFINITY
    return student, teacher, labels


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["dense", "compressed", "linear"])
def test_infinite_cross_entropy_has_no_gradient(kind, temperature):
    """Its row keeps that of the divergence, other rows all of theirs."""
    student, teacher, labels = with_masked_labels()
    # The linear form reads the student's logits as hidden states of an identity head.
    student = student.nan_to_num(neginf=-1e4) if kind == "linear" else student
    bias = torch.zeros(17)
    options = {"divergence": "total_variation", "temperature": temperature, "labels": labels, "reduction": "none"}
    if kind == "linear":
        bias[5] = -INFINITY

    def loss(x, **more):
        if kind == "linear":
            head = TeacherHead(teacher.nan_to_num(neginf=-1e4), torch.eye(17))
            return linear_distillation_loss(x, torch.eye(17), head, student_bias=bias, **options, **more)
        target = compress_logits(teacher, 5, temperatures=(temperature,)) if kind == "compressed" else teacher
        return distillation_loss(x, target, **options, **more)

    x = student.clone().requires_grad_()
    plain = torch.autograd.grad(loss(x).sum(), x)[0]
    value = loss(x, ce_weight=0.5)
    both = torch.autograd.grad(value, x, torch.ones(4))[0]
    assert value.isinf().tolist() == [False, True, False, kind != "linear"]
    assert both.isfinite().all()
    torch.testing.assert_close(both[1], plain[1])
    assert not torch.allclose(both[0], plain[0])


# ---- in place: memory that others need


def test_overlapping_rows_are_refused():
    made = torch.randn(40, requires_grad=True) * 1
    with pytest.raises(ValueError, match="share memory"):
        distillation_loss(made.unfold(0, 17, 3)[:4], torch.randn(4, 17), inplace=True)


def test_a_teacher_in_the_memory_of_other_rows_is_refused():
    made = torch.randn(5, 17, requires_grad=True) * 1
    with pytest.raises(ValueError, match="overwrite teacher"):
        distillation_loss(made[1:], made[:-1], inplace=True)
    with pytest.raises(ValueError, match="overwrite teacher"):
        distillation_loss(made[:, :10], made[:, 7:], inplace=True)


@pytest.mark.parametrize("views", [lambda x: (x[:, :8], x[:, 8:16]), lambda x: (x[:2], x[2:4]), lambda x: (x, x)])
def test_sides_beside_each_other_in_one_tensor(views):
    leaf = torch.randn(4, 17, requires_grad=True)
    expected = torch.autograd.grad(distillation_loss(*views(leaf)), leaf)[0]
    found = torch.autograd.grad(distillation_loss(*views(leaf * 1), inplace=True), leaf)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_that_do_not_flatten_are_refused():
    made = (torch.randn(2, 3, 4, 17, requires_grad=True) * 1).permute(2, 1, 0, 3)
    with pytest.raises(ValueError, match="equally spaced rows"):
        distillation_loss(made, torch.randn(made.shape), inplace=True)


# ---- modules and other projects' signatures


def test_modules_may_carry_attributes_of_their_own():
    student, teacher = pair()
    criterion = DistillationLoss(divergence="forward_kl")
    criterion.note = "mine"
    torch.testing.assert_close(
        criterion(student, teacher), distillation_loss(student, teacher, divergence="forward_kl")
    )
    with pytest.raises(TypeError, match="inplace"):
        LinearDistillationLoss(inplace=True)


@pytest.mark.parametrize("lam", [0, 1, 0.0, 1.0])
def test_js_distance_at_its_ends(lam):
    student, teacher = pair()
    loss = distillm.js_distance(student, teacher, {"label": torch.tensor([0, -100, 2])}, lam)
    loss.backward()
    assert loss == 0 and (student.grad == 0).all()


# ---- the fused form


def head_case():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(4, 6, generator=generator), torch.randn(9, 6, generator=generator)
    return hidden, weight, TeacherHead(torch.randn(4, 6, generator=generator), weight + 0.5)


def test_no_teacher():
    hidden, weight, _ = head_case()
    with pytest.raises(TypeError, match="teacher must be a TeacherHead"):
        linear_distillation_loss(hidden, weight, None, torch.arange(4))


@pytest.mark.parametrize(
    "rows,message", [([1, 1], "distinct"), ([0, 4], r"rows must lie in 0\.\.3"), ([-1], r"rows must lie in 0\.\.3")]
)
def test_rows_on_the_host(rows, message):
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(*head_case(), rows=torch.tensor(rows))


def test_float64_is_not_narrowed():
    hidden, weight, teacher = head_case()
    wide = TeacherHead(teacher.hidden, teacher.weight, bias=torch.zeros(9, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"teacher\.bias"):
        linear_distillation_loss(hidden, weight, wide)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="student_bias"):
        linear_distillation_loss(hidden, weight, teacher, student_bias=torch.zeros(9, dtype=torch.float64))
