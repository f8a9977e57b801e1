"""Rows of a compressed teacher that are not plain: padding, duplicates, other vocabularies, masks, NaN, infinities."""

import math

import pytest
import torch
from sparse_cases import FORMS, SPARSE_DIVERGENCES, assert_close, compressed, edited, logits, oracle, run

from distillm_ext import distillation_loss

UPSTREAM = torch.tensor([1.0, -0.5, 2.0, 0.5])


def teacher_and_student(tail="bucket", vocab=90, k=12):
    student, teacher = logits(4, vocab, seed=1), logits(4, vocab, seed=2)
    return student, compressed(teacher, k, tail)


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_padding_out_of_range_and_duplicate_ids_contribute_nothing(divergence, tail):
    student, teacher = teacher_and_student(tail)
    options = dict(divergence=divergence, tail=tail)
    clean = run(student, teacher, UPSTREAM, **options)
    junk = torch.tensor([-1, 90, 2**31 - 1, -(2**31), 0, 0]).int().expand(4, 6).clone()
    junk[:, 4:] = teacher.ids[:, :2]  # come later than the entries they repeat
    noise = torch.tensor([math.nan, 0.0, -1.0, -math.inf, -0.5, math.inf]).expand(4, 6)
    dirty = edited(
        teacher,
        ids=torch.cat([teacher.ids, junk], -1),
        logprobs=torch.cat([teacher.logprobs, noise], -1),
        counts=None if teacher.counts is None else torch.cat([teacher.counts, torch.full((4, 6), 7).int()], -1),
    )
    for ours, expected in zip(run(student, dirty, UPSTREAM, **options), clean, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_order_of_the_kept_entries_does_not_matter(divergence, tail):
    student, teacher = teacher_and_student(tail)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = edited(
        teacher, ids=teacher.ids[:, order], logprobs=teacher.logprobs[:, order],
        counts=None if teacher.counts is None else teacher.counts[:, order],
    )  # fmt: skip
    options = dict(divergence=divergence, tail=tail)
    a, b = run(student, teacher, UPSTREAM, **options), run(student, shuffled, UPSTREAM, **options)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_student_with_fewer_entries(divergence, tail):
    """The student's probability of what it lacks is 0: infinite in forward KL, which is refused, bounded in others."""
    student, teacher = logits(4, 60, seed=1), logits(4, 90, seed=2)
    sparse, options = compressed(teacher, 12, tail), dict(divergence=divergence, tail=tail)
    if divergence == "forward_kl":
        with pytest.raises(ValueError, match="vocab_size=60"):
            run(student, sparse, UPSTREAM, **options)
        return
    assert (sparse.ids >= 60).any()
    assert_close(
        *run(student, sparse, UPSTREAM, **options), *oracle(student, sparse, UPSTREAM, **options), student.dtype
    )


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_student_with_more_entries(divergence, tail):
    student, teacher = logits(4, 120, seed=1), logits(4, 90, seed=2)
    sparse, options = compressed(teacher, 12, tail), dict(divergence=divergence, tail=tail)
    assert_close(
        *run(student, sparse, UPSTREAM, **options), *oracle(student, sparse, UPSTREAM, **options), student.dtype
    )


@pytest.mark.parametrize("divergence", SPARSE_DIVERGENCES)
@pytest.mark.parametrize("vocabs", ((60, 90), (120, 90), (90, 90)))
def test_vocab_size_cuts_both_sides(divergence, vocabs):
    student, teacher = (logits(4, vocab, torch.float64, seed) for seed, vocab in enumerate(vocabs))
    options = dict(divergence=divergence, vocab_size=50, temperature=2.5)
    dense = run(student, teacher, UPSTREAM, **options)
    for ours, theirs in zip(run(student, compressed(teacher, 90), UPSTREAM, **options), dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vocab_size_counts_the_tail_as_inside():
    """Exact where the teacher has no mass above but in kept entries."""
    student, teacher = logits(4, 60, torch.float64, 1), logits(4, 90, torch.float64, 2)
    teacher[:, 60:] = -torch.inf
    teacher[:, 70] = 20.0
    sparse, cut = compressed(teacher, 12), compressed(teacher[:, :60], 11)
    ours = run(student, sparse, UPSTREAM, vocab_size=60)
    for a, b in zip(ours, run(student, cut, UPSTREAM), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="biases"):
        run(student, compressed(teacher, 12, "sampled"), UPSTREAM, tail="sampled", vocab_size=60)


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_student_logits_of_minus_infinity(divergence, tail):
    student, teacher = teacher_and_student(tail)
    student[0, ::2] = student[1, 1::2] = student[2, 40:] = -torch.inf
    options = dict(divergence=divergence, tail=tail)
    value, gradient = run(student, teacher, UPSTREAM, **options)
    expected, expected_gradient = oracle(student, teacher, UPSTREAM, **options)
    infinite = expected == torch.inf
    assert (value == torch.inf).equal(infinite) and (gradient[infinite] == 0).all()
    assert infinite[:3].all() if divergence == "forward_kl" else not infinite.any()
    assert_close(
        value[~infinite], gradient[~infinite], expected[~infinite], expected_gradient[~infinite], student.dtype
    )
    assert (gradient[student == -torch.inf] == 0).all()


def test_student_without_mass_off_the_kept_entries():
    """Its logarithm is bounded, in value and gradient alike; only forward KL asks for it."""
    student, teacher = teacher_and_student()
    mask = torch.ones(4, 90, dtype=torch.bool).scatter(1, teacher.ids.long(), False)
    student[mask] = -torch.inf
    for divergence in SPARSE_DIVERGENCES:
        value, gradient = run(student, teacher, UPSTREAM, divergence=divergence)
        assert value.isfinite().all() and gradient.isfinite().all() and (gradient[mask] == 0).all()
        assert_close(value, gradient, *oracle(student, teacher, UPSTREAM, divergence=divergence), student.dtype)


def test_tails_far_below_float():
    """r = e^-200 underflows, its logarithm does not; nor does the gradient of forward KL off the kept entries."""
    student, teacher = teacher_and_student()
    student.scatter_(1, teacher.ids.long(), 100.0)
    student[:, 50:] -= 100.0
    for divergence in ("forward_kl", "reverse_kl", "skew_kl"):
        result = run(student, teacher, UPSTREAM, divergence=divergence)
        assert_close(*result, *oracle(student, teacher, UPSTREAM, divergence=divergence), student.dtype)
    assert run(student, teacher, UPSTREAM, divergence="forward_kl")[1][:, 50:].abs().max() > 1e-4


def test_teacher_without_a_tail_makes_reverse_kl_infinite():
    student, teacher = teacher_and_student()
    teacher.tail_logprob[1] = -torch.inf
    value, gradient = run(student, teacher, UPSTREAM, divergence="reverse_kl")
    assert value.isinf().tolist() == [False, True, False, False] and (gradient[1] == 0).all()
    capped = run(student, teacher, UPSTREAM, divergence="reverse_kl", cap=0.25)
    assert capped[0][1] == 0.25 and (capped[1][1] == 0).all()


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_bad_rows_stay_alone(divergence, tail):
    student, teacher = logits(9, 90, seed=1), compressed(logits(9, 90, seed=2), 12, tail)
    options, upstream = dict(divergence=divergence, tail=tail), torch.ones(9)
    clean = run(student, teacher, upstream, **options)
    student[0, 80], student[1], student[2, int(teacher.ids[2, 0])] = torch.nan, -torch.inf, torch.inf
    teacher.logprobs[3, 2], teacher.logprobs[4, 0] = torch.nan, torch.inf
    teacher.log_norm[5, 0], teacher.valid[6] = torch.nan, False
    bad = [True] * 7 + [False] * 2
    if tail == "bucket":
        teacher.tail_logprob[7, 0], bad[7] = torch.nan, True
    value, gradient = run(student, teacher, upstream, **options)
    assert value.isnan().tolist() == bad and gradient.isnan().all(-1).tolist() == bad
    fine = ~torch.tensor(bad)
    assert value[fine].equal(clean[0][fine]) and gradient[fine].equal(clean[1][fine])


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_ignored_rows_weights_caps_and_cross_entropy(divergence, tail):
    dtype = torch.float64
    student, teacher = logits(8, 90, dtype, 1), compressed(logits(8, 90, dtype, 2), 12, tail)
    student[0], student[1] = torch.nan, torch.nan
    # A label off the kept entries, one on them, an illegal one.
    on = int(teacher.ids[3, 0])
    off = next(v for v in range(90) if v not in teacher.ids[2].tolist())
    labels = torch.tensor([-100, 5, off, on, 7, 8, 9, 90])
    weight = torch.tensor([1.0, 0.0, 2.0, 3.0, -1.0, 0.5, 1.0, 1.0], dtype=dtype)
    cap = torch.tensor([9.0, 9, 99, 99, 99, 0.0, 99, 99], dtype=dtype)
    upstream = torch.tensor([1.0, 1.0, -0.5, 2.0, 1.0, 3.0, 1.0, 1.0])
    for temperature in (1.0,) if tail == "sampled" else (1.0, 2.5):
        options = dict(divergence=divergence, tail=tail, temperature=temperature)
        value, gradient = run(student, teacher, upstream, labels, weight=weight, cap=cap, ce_weight=0.7, **options)
        assert (value[:2] == 0).all() and (gradient[:2] == 0).all() and value[7].isnan() and gradient[7].isnan().all()
        good = torch.tensor([2, 3, 4, 6])
        plain, plain_gradient = oracle(student[good], teacher[good], weight[good] * upstream[good], **options)
        leaf = student[good].clone().requires_grad_()
        ce = torch.nn.functional.cross_entropy(leaf, labels[good], reduction="none")
        (ce * weight[good] * upstream[good] * 0.7).sum().backward()
        expected = weight[good] * (plain + 0.7 * ce.detach())
        assert_close(value[good], gradient[good], expected, plain_gradient + leaf.grad, dtype)
        # Row 5 is capped at 0, which estimates and truncated values may be below: the cross-entropy alone is left.
        if oracle(student[5:6], teacher[5:6], upstream[5:6], **options)[0] > 0:
            leaf = student[5].clone().requires_grad_()
            (torch.nn.functional.cross_entropy(leaf, labels[5]) * 0.7 * 0.5 * 3).backward()
            torch.testing.assert_close(gradient[5], leaf.grad)


def test_layouts_and_empty_inputs():
    student, teacher = teacher_and_student()
    expected = distillation_loss(student, teacher, reduction="none")
    wide = torch.cat([student, student], 1)[:, :90]
    transposed = student.t().contiguous().t()
    for view in (wide, transposed):
        torch.testing.assert_close(distillation_loss(view, teacher, reduction="none"), expected, rtol=0, atol=0)
    doubled = edited(teacher, ids=teacher.ids.repeat(1, 2)[:, :12], logprobs=teacher.logprobs.t().contiguous().t())
    torch.testing.assert_close(distillation_loss(student, doubled, reduction="none"), expected, rtol=0, atol=0)
    square = distillation_loss(student.view(2, 2, 90), teacher.reshape(2, 2), reduction="none")
    torch.testing.assert_close(square.view(-1), expected, rtol=0, atol=0)
    empty = student[:0].clone().requires_grad_()
    loss = distillation_loss(empty, teacher[:0])
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 90)
    ignored = distillation_loss(student, teacher, torch.full((4,), -100))
    assert ignored == 0
