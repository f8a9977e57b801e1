"""`distillation_loss` on the CPU against the float64 reference: values, gradients, hyper-parameters, limits."""

import math

import pytest
import torch
from divergence_cases import DTYPES, SKEWED, assert_close, logits, oracle, run

from distillm_ext.functional import DIVERGENCES

VOCABULARIES = (1, 2, 7, 31, 1023, 1024, 1025, 50257)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_value_and_gradient(divergence, dtype, vocab):
    student, teacher = logits(4, vocab, dtype, 1), logits(4, vocab, dtype, 2)
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.25])
    for temperature in (1.0, 2.5):
        ours = run(student, teacher, upstream, divergence=divergence, temperature=temperature)
        expected = oracle(student, teacher, upstream, divergence=divergence, temperature=temperature)
        assert_close(*ours, *expected, dtype)


@pytest.mark.parametrize("divergence", SKEWED)
@pytest.mark.parametrize("alpha", (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_alpha(divergence, alpha, dtype):
    student, teacher = logits(3, 501, dtype, 1, scale=6), logits(3, 501, dtype, 2, scale=6)
    upstream = torch.ones(3)
    ours = run(student, teacher, upstream, divergence=divergence, alpha=alpha)
    value, gradient = oracle(student, teacher, upstream, divergence=divergence, alpha=alpha)
    assert_close(*ours, value, gradient, dtype)


def test_alpha_zero_is_the_plain_divergence_where_probabilities_underflow():
    """q underflows at the first entry, yet log q is finite: the limit must come from the logits."""
    student = torch.tensor([[-200.0, 0.0, 1.0]])
    teacher = torch.tensor([[2.0, 0.0, 1.0]])
    for skewed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        a, b = (student, teacher) if plain == "forward_kl" else (teacher, student)
        left = run(a, b, torch.ones(1), divergence=skewed, alpha=0.0)
        right = run(a, b, torch.ones(1), divergence=plain)
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)
        assert right[0].item() > 100


@pytest.mark.parametrize("divergence", ("symmetric_kl", "generalized_js", "alpha_beta"))
@pytest.mark.parametrize("beta", (0.05, 0.5, 0.95))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_beta(divergence, beta, dtype):
    student, teacher, upstream = logits(3, 501, dtype, 1), logits(3, 501, dtype, 2), torch.ones(3)
    ours = run(student, teacher, upstream, divergence=divergence, beta=beta)
    assert_close(*ours, *oracle(student, teacher, upstream, divergence=divergence, beta=beta), dtype)


def test_limits_of_the_families():
    student, teacher, upstream = logits(3, 99, torch.float64, 1), logits(3, 99, torch.float64, 2), torch.ones(3)
    forward, reverse = (run(student, teacher, upstream, divergence=f"{name}_kl") for name in ("forward", "reverse"))
    same = {
        "forward": (dict(divergence="generalized_js", beta=0.0), dict(divergence="symmetric_kl", beta=0.0),
                    dict(divergence="alpha_beta", alpha=1.0, beta=0.0)),
        "reverse": (dict(divergence="generalized_js", beta=1.0), dict(divergence="symmetric_kl", beta=1.0),
                    dict(divergence="alpha_beta", alpha=0.0, beta=1.0)),
    }  # fmt: skip
    for name, expected in (("forward", forward), ("reverse", reverse)):
        for options in same[name]:
            torch.testing.assert_close(run(student, teacher, upstream, **options), expected)
    close = run(student, teacher, upstream, divergence="alpha_beta", alpha=1.0, beta=1e-5)
    torch.testing.assert_close(close[0], forward[0], rtol=1e-3, atol=0)


def test_identities_between_members():
    student, teacher, upstream = logits(4, 99, torch.float64, 1), logits(4, 99, torch.float64, 2), torch.ones(4)
    skew = run(student, teacher, upstream, divergence="skew_kl", alpha=0.3)
    reverse = run(student, teacher, upstream, divergence="skew_reverse_kl", alpha=0.7)
    js = run(student, teacher, upstream, divergence="generalized_js", beta=0.3)
    for i in range(2):
        torch.testing.assert_close(js[i], 0.3 * skew[i] + 0.7 * reverse[i])
    both = [run(student, teacher, upstream, divergence=f"{name}_kl")[0] for name in ("forward", "reverse")]
    torch.testing.assert_close(run(student, teacher, upstream, divergence="token_adaptive")[0], both[0] + both[1])
    total = run(student, teacher, upstream, divergence="total_variation")[0]
    assert (total >= 0).all() and (total <= 1).all()


def test_total_variation_has_no_gradient_at_ties():
    x = logits(2, 64, torch.float32, 1)
    assert (run(x, x, torch.ones(2), divergence="total_variation")[1] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_detach_mixture(dtype):
    student, teacher, upstream = logits(3, 77, dtype, 1), logits(3, 77, dtype, 2), torch.ones(3)
    options = dict(divergence="skew_reverse_kl", alpha=0.3, detach_mixture=True)
    ours = run(student, teacher, upstream, **options)
    assert_close(*ours, *oracle(student, teacher, upstream, **options), dtype)
    attached = run(student, teacher, upstream, divergence="skew_reverse_kl", alpha=0.3)
    assert (attached[1] - ours[1]).abs().max() > 1e-3
    torch.testing.assert_close(attached[0], ours[0])


@pytest.mark.parametrize("divergence", SKEWED)
def test_alpha_per_row(divergence):
    student, teacher = logits(6, 100, torch.float32, 1), logits(6, 100, torch.float32, 2)
    alpha = torch.tensor([[0.0, 0.1, 0.3], [0.5, 0.7, 0.9]])
    student, teacher, upstream = student.view(2, 3, 100), teacher.view(2, 3, 100), torch.ones(2, 3)
    ours = run(student, teacher, upstream, divergence=divergence, alpha=alpha)
    for row in range(6):
        one = run(
            student.view(6, 100)[row], teacher.view(6, 100)[row], torch.ones(()), divergence=divergence,
            alpha=alpha.view(-1)[row].item(),
        )  # fmt: skip
        torch.testing.assert_close(ours[0].view(-1)[row], one[0])
        torch.testing.assert_close(ours[1].view(6, 100)[row], one[1])


@pytest.mark.parametrize("divergence", SKEWED)
@pytest.mark.parametrize("bad", (-0.1, 1.1, math.nan))
def test_bad_alpha_in_a_tensor_spoils_its_row_only(divergence, bad):
    student, teacher = logits(3, 20, torch.float32, 1), logits(3, 20, torch.float32, 2)
    value, gradient = run(student, teacher, torch.ones(3), divergence=divergence, alpha=torch.tensor([0.1, bad, 0.1]))
    assert value.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("student_dtype", DTYPES[1:])
@pytest.mark.parametrize("teacher_dtype", DTYPES[1:])
def test_mixed_dtypes(student_dtype, teacher_dtype):
    student, teacher = logits(3, 1100, student_dtype, 1), logits(3, 1100, teacher_dtype, 2)
    ours = run(student, teacher, torch.ones(3))
    assert_close(*ours, *oracle(student, teacher, torch.ones(3), divergence="skew_kl"), student_dtype)
