"""`distillation_loss` from compressed teachers on the CPU, against the float64 reference and the dense loss."""

import math

import pytest
import torch
from sparse_cases import FORMS, SAMPLED_DIVERGENCES, SPARSE_DIVERGENCES, assert_close, compressed, logits, oracle, run

from distillm_ext import distillation_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (vocabulary, kept entries): one entry, all of them, more than there are, more than one tile of either
SIZES = ((1, 1), (7, 3), (31, 31), (40, 64), (1025, 64), (2600, 1100))


@pytest.mark.parametrize("divergence,tail", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(divergence, tail, dtype):
    upstream = torch.tensor([1.0, -0.5, 2.0])
    for vocab, k in SIZES:
        student, teacher = logits(3, vocab, dtype, 1), logits(3, vocab, dtype, 2)
        sparse = compressed(teacher.double() if dtype == torch.float64 else teacher.float(), k, tail)
        for temperature in (1.0,) if tail == "sampled" else (1.0, 2.5):
            options = dict(divergence=divergence, tail=tail, temperature=temperature)
            assert_close(
                *run(student, sparse, upstream, **options), *oracle(student, sparse, upstream, **options), dtype
            )


@pytest.mark.parametrize("divergence,tail", [form for form in FORMS if "skew" in form[0]])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_alpha_per_position_and_detached_mixtures(divergence, tail, dtype):
    student, teacher = logits(5, 300, dtype, 1, 5.0), logits(5, 300, dtype, 2, 5.0)
    sparse, upstream = compressed(teacher, 20, tail), torch.tensor([1.0, 2.0, -1.0, 0.5, 1.0])
    alpha = torch.tensor([0.0, 1e-3, 0.3, 0.9, 1.0], dtype=torch.float64)
    if divergence == "skew_reverse_kl" and tail == "sampled":
        alpha[0] = 0.5  # at 0 it is reverse KL, which has no such form
    for detach in (False, True) if divergence == "skew_reverse_kl" else (False,):
        options = dict(divergence=divergence, tail=tail, detach_mixture=detach)
        value, gradient = run(student, sparse, upstream, alpha=alpha, **options)
        for row in range(5):
            one, changed = slice(row, row + 1), {"alpha": alpha[row].item()}
            if divergence == "skew_reverse_kl" and alpha[row] == 0 and tail == "truncate":
                changed = {"divergence": "reverse_kl"}  # the entry (0, r) is left out
            expected = oracle(student[one], sparse[one], upstream[one], **(options | changed))
            assert_close(value[row : row + 1], gradient[row : row + 1], *expected, dtype)


@pytest.mark.parametrize("beta", (0.05, 0.5, 0.95))
@pytest.mark.parametrize("tail", ("bucket", "truncate", "renormalize"))
def test_beta(beta, tail):
    student, teacher = logits(3, 300, seed=1), logits(3, 300, seed=2)
    options = dict(divergence="generalized_js", beta=beta, tail=tail)
    sparse, upstream = compressed(teacher, 20), torch.ones(3)
    assert_close(
        *run(student, sparse, upstream, **options), *oracle(student, sparse, upstream, **options), torch.float32
    )


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("temperature", (1.0, 2.5))
def test_all_entries_kept_is_the_dense_loss(divergence, dtype, temperature):
    """Masks, weights, caps and cross-entropy included, whatever the tail."""
    student, teacher = logits(6, 200, dtype, 1), logits(6, 200, dtype, 2)
    teacher[1, 3:] = student[2, ::2] = teacher[2, ::2] = -torch.inf
    labels = torch.tensor([3, 1, -100, 199, 5, 0])
    options = dict(
        divergence=divergence, temperature=temperature, ce_weight=0.7, weight=torch.tensor([1.0, 2, 3, 0, 0.5, 1]),
        cap=torch.tensor([9.0, 9, 9, 9, 0.01, 9]),
    )  # fmt: skip
    upstream = torch.tensor([1.0, -0.5, 2.0, 1.0, 3.0, 1.0])
    dense = run(student, teacher, upstream, labels, **options)
    for tail in ("bucket", "truncate", "renormalize"):
        if divergence == "reverse_kl" and tail != "bucket":
            # Row 1: the dense loss is infinite (capped), which entries left out do not know.
            options["weight"] = torch.tensor([1.0, 0, 3, 0, 0.5, 1])
            dense = run(student, teacher, upstream, labels, **options)
        if tail == "renormalize":
            # Rows 1 and 2: the student's mass off the kept entries is left out.
            options["weight"] = torch.tensor([1.0, 0, 0, 0, 0.5, 1])
            dense = run(student, teacher, upstream, labels, **options)
        sparse = run(student, compressed(teacher, 230), upstream, labels, tail=tail, **options)
        tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        for ours, theirs in zip(sparse, dense, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES)
def test_reductions_and_num_items(divergence):
    student, teacher = logits(6, 50, seed=1).view(2, 3, 50), logits(6, 50, seed=2).view(2, 3, 50)
    labels, sparse = torch.tensor([[1, -100, 2], [3, 4, 5]]), compressed(teacher, 60)
    weight = torch.rand(2, 3)
    for options in ({}, {"reduction": "sum"}, {"num_items": 11}, {"num_items": torch.tensor(7)}, {"weight": weight}):
        ours = distillation_loss(student, sparse, labels, divergence=divergence, **options)
        torch.testing.assert_close(ours, distillation_loss(student, teacher, labels, divergence=divergence, **options))


@pytest.mark.parametrize("divergence", SAMPLED_DIVERGENCES)
def test_sampled_forms_are_unbiased(divergence):
    """Means over many draws, of value and gradient, against the dense loss: within 5 standard errors."""
    draws, vocab = 4000, 60
    student, teacher = logits(1, vocab, torch.float64, 1, 2.0), logits(1, vocab, torch.float64, 2, 2.0)
    dense_value, dense_gradient = run(student, teacher, torch.ones(1), divergence=divergence)
    many = compressed(teacher.expand(draws, vocab), 6, "sampled")
    value, gradient = run(
        student.expand(draws, vocab), many, torch.ones(draws), divergence=divergence, tail="sampled"
    )  # fmt: skip
    for sample, expected in ((value.unsqueeze(-1), dense_value), (gradient, dense_gradient[0])):
        error = sample.mean(0) - expected
        allowed = 5 * sample.std(0) / math.sqrt(draws) + 1e-12
        assert (error.abs() <= allowed).all(), (error / allowed).abs().max()
    # Counts taken for probabilities would be far off.
    assert value.std() / math.sqrt(draws) < 0.05 * dense_value


@pytest.mark.parametrize("divergence", ("skew_kl", "skew_reverse_kl"))
def test_truncated_tails_are_off_by_no_more_than_their_bound(divergence):
    alpha, student, teacher = 0.1, logits(8, 400, torch.float64, 1), logits(8, 400, torch.float64, 2)
    sparse = compressed(teacher, 16)
    t = sparse.tail_logprob[:, 0].exp()
    exact = distillation_loss(student, teacher, divergence=divergence, alpha=alpha, reduction="none")
    ours = distillation_loss(student, sparse, divergence=divergence, alpha=alpha, tail="truncate", reduction="none")
    missed = exact - ours
    if divergence == "skew_kl":
        assert (missed <= t * math.log(1 / alpha)).all()
    else:
        assert (missed <= 1e-12).all() and (missed >= -t * (1 - alpha) / alpha).all()
    assert missed.abs().max() > 1e-3  # the tail matters here


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES)
def test_coarsening_loses_divergence(divergence):
    """A bucket never adds to a divergence, and more kept entries never take from it."""
    student, teacher = logits(8, 400, torch.float64, 1), logits(8, 400, torch.float64, 2)
    values = [
        distillation_loss(student, compressed(teacher, k), divergence=divergence, reduction="none")
        for k in (4, 16, 64, 400)
    ]
    for coarse, fine in zip(values, values[1:], strict=False):
        assert (coarse <= fine + 1e-12).all() and (coarse >= 0).all()


@pytest.mark.parametrize("divergence,tail", [form for form in FORMS if form[1] in ("bucket", "renormalize")])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_identical_distributions_give_zero(divergence, tail, dtype):
    for vocab, k in ((7, 7), (50257, 64), (50257, 1024)):
        x = logits(2, vocab, dtype, 3)
        value, gradient = run(x, compressed(x.float(), k), torch.ones(2), divergence=divergence, tail=tail)
        assert value.abs().max() <= 1e-6
        assert gradient.abs().max() <= 4e-7
