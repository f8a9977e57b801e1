"""`distillation_loss` on the CPU against the float64 reference: values, gradients, masks, limits, layouts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_ext import distillation_loss, reference
from distillm_ext.functional import DIVERGENCES

SKEWED = ("skew_kl", "skew_reverse_kl")
ALWAYS_FINITE = (*SKEWED, "generalized_js", "total_variation", "alpha_beta")
# Infinite where the student, or the teacher, lacks an entry that the other side has.
INFINITE_WITHOUT = {
    "forward_kl": ("student",),
    "reverse_kl": ("teacher",),
    "symmetric_kl": ("student", "teacher"),
    "token_adaptive": ("student", "teacher"),
}
INFINITE_CASES = [(name, side) for name, sides in INFINITE_WITHOUT.items() for side in sides]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest relative error of a gradient: rounding of the storage format, or of float arithmetic.
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
VOCABULARIES = (1, 2, 7, 31, 1023, 1024, 1025, 50257)


def logits(rows, vocab, dtype, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def oracle(student, teacher, upstream, **options):
    """Per-position values and the gradient for an upstream gradient, in float64."""
    student = student.detach().double().requires_grad_()
    value = reference.per_token_divergence(student, teacher.double(), **options)
    (value * upstream.double()).sum().backward()
    return value.detach(), student.grad


def run(student, teacher, upstream, **options):
    student = student.detach().clone().requires_grad_()
    value = distillation_loss(student, teacher, reduction="none", **options)
    value.backward(upstream.to(value.dtype))
    return value.detach(), student.grad


def assert_close(value, gradient, expected_value, expected_gradient, dtype):
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), expected_value, rtol=tolerance, atol=tolerance)
    assert gradient.dtype == dtype
    largest = expected_gradient.abs().amax(-1, keepdim=True)
    # A gradient is a difference of terms up to log(1/alpha) times the upstream gradient, formed in float.
    absolute = 1e-15 if dtype == torch.float64 else 1.5e-6
    error = (gradient.double() - expected_gradient).abs()
    assert (error <= GRADIENT_TOLERANCE[dtype] * largest + absolute).all(), error.max()


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


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("vocab", (7, 50257, 152064))
def test_identical_inputs_give_zero(divergence, dtype, vocab):
    x = logits(2, vocab, dtype, 3)
    value, gradient = run(x, x, torch.ones(2), divergence=divergence)
    assert value.abs().max() <= 1e-6
    assert gradient.abs().max() <= 2e-7


@pytest.mark.parametrize("divergence", SKEWED)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bounds_and_zero_gradient_sums(divergence, dtype):
    student, teacher = logits(8, 4097, dtype, 1, scale=15), logits(8, 4097, dtype, 2, scale=15)
    value, gradient = run(student, teacher, torch.ones(8), divergence=divergence, alpha=0.1)
    assert (value >= -1e-6).all() and (value <= math.log(10) + 1e-5).all()
    assert gradient.double().sum(-1).abs().max() < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_underflow_on_both_sides(divergence):
    """Liger #1453: the mixture of two underflowed probabilities."""
    x = torch.tensor([[120.0, 0.0, -120.0]])
    for student, teacher in ((x, x.flip(-1)), (x, x), (x * 80, x * 80)):
        ours = run(student, teacher, torch.ones(1), divergence=divergence)
        expected = oracle(student, teacher, torch.ones(1), divergence=divergence)
        torch.testing.assert_close(ours[0].double(), expected[0], rtol=1e-6, atol=1e-6)
        scale = 1 + expected[0].abs().item()  # gradients are differences of terms of this size
        torch.testing.assert_close(ours[1].double(), expected[1], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("offset", (1e4, -1e4))
def test_large_logits_keep_their_digits(divergence, offset):
    student, teacher = logits(2, 300, torch.float32, 1), logits(2, 300, torch.float32, 2)
    student, teacher = student + offset, teacher - offset
    ours = run(student, teacher, torch.ones(2), divergence=divergence)
    assert_close(*ours, *oracle(student, teacher, torch.ones(2), divergence=divergence), torch.float32)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_masked_vocabulary(divergence, dtype):
    """-inf on both sides, and on the side where it is legal, with an exactly zero gradient there (TRL #5594)."""
    student, teacher = logits(2, 2100, dtype, 1), logits(2, 2100, dtype, 2)
    student[:, :1100] = teacher[:, :1100] = -torch.inf  # a whole tile and more
    infinite = INFINITE_WITHOUT.get(divergence, ())
    if "teacher" not in infinite:
        teacher[:, 1500] = -torch.inf
    if "student" not in infinite:
        student[:, 1600] = -torch.inf
    ours = run(student, teacher, torch.ones(2), divergence=divergence)
    assert_close(*ours, *oracle(student, teacher, torch.ones(2), divergence=divergence), dtype)
    assert (ours[1][student == -torch.inf] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_finite_column(divergence):
    x = torch.full((2, 50), -torch.inf)
    x[:, 17] = 3.0
    value, gradient = run(x, x, torch.ones(2), divergence=divergence)
    assert value.tolist() == [0.0, 0.0] and (gradient == 0).all()


@pytest.mark.parametrize(
    "divergence, missing", [(name, side) for name in INFINITE_WITHOUT for side in INFINITE_WITHOUT[name]]
)
def test_infinite_divergence_has_zero_gradient(divergence, missing):
    student, teacher = logits(3, 40, torch.float32, 1), logits(3, 40, torch.float32, 2)
    (student if missing == "student" else teacher)[1, 5] = -torch.inf
    value, gradient = run(student, teacher, torch.ones(3), divergence=divergence)
    assert value.isinf().tolist() == [False, True, False]
    assert (gradient[1] == 0).all() and (gradient[[0, 2]].abs().sum(-1) > 0).all()
    labels = torch.zeros(3, dtype=torch.int64)
    _, with_ce = run(student, teacher, torch.ones(3), divergence=divergence, labels=labels, ce_weight=1.0)
    student = student.double().requires_grad_()
    torch.nn.functional.cross_entropy(student, labels, reduction="sum").backward()
    torch.testing.assert_close(with_ce[1].double(), student.grad[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", ("student", "teacher"))
@pytest.mark.parametrize("what", (math.nan, math.inf, "all"))
def test_unusable_rows_stay_alone(divergence, side, what):
    student, teacher = logits(3, 2000, torch.float32, 1), logits(3, 2000, torch.float32, 2)
    clean = run(student, teacher, torch.ones(3), divergence=divergence)
    broken = student if side == "student" else teacher
    if what == "all":
        broken[1] = -torch.inf
    else:
        broken[1, 1777] = what
    value, gradient = run(student, teacher, torch.ones(3), divergence=divergence)
    assert value.isnan().tolist() == [False, True, False] and gradient[1].isnan().all()
    torch.testing.assert_close(value[[0, 2]], clean[0][[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(gradient[[0, 2]], clean[1][[0, 2]], rtol=0, atol=0)


def test_nan_with_any_payload_is_seen():
    x = torch.zeros(1, 64)
    for bits in (0x7F800001, 0x7FC00001, -1, -0x3FFFFF):
        x.view(torch.int32)[0, 9] = bits
        assert distillation_loss(x, torch.zeros(1, 64)).isnan()


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


@pytest.mark.parametrize("shape", ((0, 5), (0,), (2, 0, 5), (5,), (1, 1, 1, 5)))
def test_shapes_and_empty_inputs(shape):
    shape = shape if shape[-1] == 5 else (*shape, 5)
    student = torch.randn(shape, requires_grad=True)
    loss = distillation_loss(student, torch.randn(shape))
    loss.backward()
    assert loss.shape == () and student.grad.shape == student.shape and loss.isfinite()
    assert distillation_loss(student, torch.randn(shape), reduction="none").shape == shape[:-1]


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


@pytest.mark.parametrize("student_dtype", DTYPES[1:])
@pytest.mark.parametrize("teacher_dtype", DTYPES[1:])
def test_mixed_dtypes(student_dtype, teacher_dtype):
    student, teacher = logits(3, 1100, student_dtype, 1), logits(3, 1100, teacher_dtype, 2)
    ours = run(student, teacher, torch.ones(3))
    assert_close(*ours, *oracle(student, teacher, torch.ones(3), divergence="skew_kl"), student_dtype)


def test_layouts():
    """Transposed, strided, expanded and offset inputs, and rows wider than they are used."""
    base = logits(40, 60, torch.float32, 1)
    teacher = logits(40, 60, torch.float32, 2)
    expected = run(base, teacher, torch.ones(40))
    views = {
        "transposed": base.t().contiguous().t(),
        "wide rows": torch.cat([base, base * 0 + 99], 1)[:, :60],
        "every other row": torch.stack([base, base], 1).view(80, 60)[::2],
        "column stride 2": torch.stack([base, base], 2).view(40, 120)[:, ::2],
        "offset": torch.cat([torch.zeros(1), base.flatten()])[1:].view(40, 60),
    }
    for name, view in views.items():
        leaf = view.detach().requires_grad_()
        value = distillation_loss(leaf, teacher, reduction="none")
        value.sum().backward()
        torch.testing.assert_close(value, expected[0], msg=name)
        torch.testing.assert_close(leaf.grad, expected[1], msg=name)
    same = distillation_loss(base, teacher[:1].expand(40, 60), reduction="none")
    torch.testing.assert_close(same, distillation_loss(base, teacher[:1].repeat(40, 1), reduction="none"))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("temperature", (1.0, 3.0))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cross_entropy_of_the_same_pass(dtype, temperature, divergence):
    student, teacher = logits(5, 1300, dtype, 1), logits(5, 1300, dtype, 2)
    labels = torch.tensor([0, 1299, -100, 1024, 77])
    upstream = torch.tensor([1.0, 0.5, 1.0, 2.0, -1.0])
    ours = run(student, teacher, upstream, labels=labels, divergence=divergence, temperature=temperature, ce_weight=0.7)
    leaf = student.double().requires_grad_()
    divergences = reference.per_token_divergence(leaf, teacher.double(), divergence=divergence, temperature=temperature)
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


finite = st.floats(-40, 40, width=32)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.sampled_from(DIVERGENCES), st.floats(0.25, 4.0))
def test_property_against_the_reference(data, vocab, divergence, temperature):
    row = st.lists(finite, min_size=vocab, max_size=vocab)
    student, teacher = (torch.tensor([data.draw(row)], dtype=torch.float32) for _ in range(2))
    ours = run(student, teacher, torch.ones(1), divergence=divergence, temperature=temperature)
    expected = oracle(student, teacher, torch.ones(1), divergence=divergence, temperature=temperature)
    np.testing.assert_allclose(ours[0].double(), expected[0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(ours[1].double(), expected[1], rtol=1e-4, atol=2e-6 * max(1.0, expected[0].item()))


def test_result_does_not_depend_on_the_number_of_threads():
    student, teacher = logits(64, 3000, torch.float32, 1), logits(64, 3000, torch.float32, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(student, teacher, torch.ones(64)))
    finally:
        torch.set_num_threads(threads)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(gradient, results[0][1])
