"""`distillation_loss` where naive code fails: extreme, masked, missing, broken and oddly laid out logits."""

import math

import numpy as np
import pytest
import torch
from divergence_cases import INFINITE_WITHOUT, SKEWED, assert_close, logits, oracle, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distillm_ext import distillation_loss
from distillm_ext.functional import DIVERGENCES


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("vocab", (1, 2, 7, 31, 1023, 50257, 152064, 262144))
def test_identical_inputs_give_zero(divergence, dtype, vocab):
    x = logits(2, vocab, dtype, 3)
    value, gradient = run(x, x, torch.ones(2), divergence=divergence)
    assert value.abs().max() <= 1e-6
    assert gradient.abs().max() <= 2e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("vocab", (152064, 262144))
def test_large_vocabularies(divergence, dtype, vocab):
    student, teacher = logits(1, vocab, dtype, 1), logits(1, vocab, dtype, 2)
    sides = student, teacher, torch.full((1,), -2.0)
    assert_close(*run(*sides, divergence=divergence), *oracle(*sides, divergence=divergence), dtype)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_logits_of_ten_thousand(divergence, dtype):
    """Probabilities are 0 or shares of a few equal logits; logarithms of the others reach -28,900."""
    generator = torch.Generator().manual_seed(4)
    signs = torch.randint(0, 2, (2, 4, 1100), generator=generator).to(torch.float64) * 2 - 1
    student, teacher = (signs * 1e4).to(dtype)
    student[3], teacher[3] = teacher[2].clone(), teacher[2].clone()
    value, gradient = run(student, teacher, torch.ones(4), divergence=divergence)
    expected, slope = oracle(student, teacher, torch.ones(4), divergence=divergence)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    scale = 1 + expected[:, None]  # gradients are differences of terms of this size
    # Where a gradient is tiny beside them, the rounding of the terms is all there is of it.
    assert ((gradient.double() - slope).abs() <= scale * 2e-6 + slope.abs() * 2**-8).all()
    assert value[3].abs() <= 1e-6 and gradient[3].abs().max() <= 2e-7


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


@pytest.mark.parametrize("shape", ((0, 5), (0,), (2, 0, 5), (5,), (1, 1, 1, 5)))
def test_shapes_and_empty_inputs(shape):
    shape = shape if shape[-1] == 5 else (*shape, 5)
    student = torch.randn(shape, requires_grad=True)
    loss = distillation_loss(student, torch.randn(shape))
    loss.backward()
    assert loss.shape == () and student.grad.shape == student.shape and loss.isfinite()
    assert distillation_loss(student, torch.randn(shape), reduction="none").shape == shape[:-1]


finite = st.floats(-40, 40, width=32)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 40), st.sampled_from(DIVERGENCES), st.floats(0.25, 4.0))
def test_property_against_the_reference(data, vocab, divergence, temperature):
    row = st.lists(finite, min_size=vocab, max_size=vocab)
    student, teacher = (torch.tensor([data.draw(row)], dtype=torch.float32) for _ in range(2))
    if divergence == "total_variation" and not torch.equal(student, teacher):
        # The sign of p - q is a matter of rounding where they are all but equal.
        q, p = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
        assume(not ((p - q).abs() < 1e-5 * torch.maximum(p, q)).any())
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
