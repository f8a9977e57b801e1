"""adaptive_kl and interpolated: what they hold constant, heads with ties, ends of their parameters, broken rows."""

import math

import numpy as np
import pytest
import torch
from divergence_cases import DTYPES, assert_close, logits, oracle, run
from divergence_oracle import adaptive_share, log_softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_ext import distillation_loss, reference

BOTH = ("adaptive_kl", "interpolated")


def log_p(x):
    return x.double().log_softmax(-1)


def same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    torch.testing.assert_close(found[1], expected[1], **tolerance)


# ---- the gradient with the detached parts held, by finite differences


def held(divergence, student, teacher, alpha):
    """The loss as a function of the student alone, with what the divergence holds constant taken at `student`."""
    log_q = log_p(student)
    if divergence == "interpolated":
        target = ((1 - alpha) * log_q + alpha * log_p(teacher)).log_softmax(-1)
        return lambda z: reference.forward_kl(target, z.log_softmax(-1))
    shares = [adaptive_share(p.numpy(), q.numpy(), alpha) for p, q in zip(log_p(teacher), log_q, strict=True)]
    share = torch.tensor(shares, dtype=torch.float64)

    def loss(z):
        forward, reverse = (f(log_p(teacher), z.log_softmax(-1)) for f in (reference.forward_kl, reference.reverse_kl))
        return (1 - share) * forward + share * reverse

    return loss


@pytest.mark.parametrize("divergence", BOTH)
@pytest.mark.parametrize("alpha", (0.1, 0.5, 0.93))
def test_gradient_by_finite_differences(divergence, alpha):
    student, teacher = logits(3, 9, torch.float64, 1), logits(3, 9, torch.float64, 2)
    value, gradient = run(student, teacher, torch.ones(3), divergence=divergence, alpha=alpha)
    loss, step = held(divergence, student, teacher, alpha), 1e-5
    torch.testing.assert_close(value, loss(student), rtol=1e-12, atol=1e-12)
    for v in range(student.shape[1]):
        shift = torch.zeros_like(student)
        shift[:, v] = step
        slope = (loss(student + shift) - loss(student - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, v], slope, rtol=0, atol=1e-9)


# ---- adaptive_kl: the head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", (0.0, 0.05, 0.5, 0.99))
@pytest.mark.parametrize("scale", (0.0, 0.01, 1.0, 12.0))
@pytest.mark.parametrize("vocab", (2, 31, 3001))
def test_head_of_flat_and_peaked_rows(dtype, alpha, scale, vocab):
    """In bfloat16 most logits are equal to others: which of them are in the head shows in the student's distance."""
    student, teacher = logits(4, vocab, dtype, 1), logits(4, vocab, dtype, 2, scale=scale)
    options = dict(divergence="adaptive_kl", alpha=alpha)
    upstream = torch.ones(4)
    assert_close(*run(student, teacher, upstream, **options), *oracle(student, teacher, upstream, **options), dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_ties_go_by_ascending_id(dtype):
    """Uniform teacher of 8: at mu = 0.5 the head is the first four, which the student's distances tell apart."""
    teacher, student = torch.zeros(1, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype)
    student[0, 6] = 2.0
    q = log_p(student).exp()[0]
    distance = (q - 1 / 8).abs()
    share = distance[4:].sum() / distance.sum()
    forward, reverse = (run(student, teacher, torch.ones(1), divergence=f"{d}_kl")[0] for d in ("forward", "reverse"))
    value, _ = run(student, teacher, torch.ones(1), divergence="adaptive_kl")
    torch.testing.assert_close(value.double(), ((1 - share) * forward + share * reverse).double())
    # The same tie across the tiles of a long row, whose sums refer to different maxima.
    long_teacher = torch.full((1, 5000), -20.0, dtype=dtype)
    long_student = torch.full((1, 5000), -20.0, dtype=dtype)
    for position, column in enumerate(range(7, 5000, 700)):
        long_teacher[0, column], long_student[0, column] = teacher[0, position], student[0, position]
    long_teacher[0, 0] = -10.0  # the first tile starts from another maximum
    again, _ = run(long_student, long_teacher, torch.ones(1), divergence="adaptive_kl")
    torch.testing.assert_close(again, value, rtol=1e-4, atol=0)


def test_minus_zero_and_zero_are_a_tie():
    student = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    plain, signed = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([[-0.0, 0.0, 0.0, -0.0]])
    same(*(run(student, t, torch.ones(1), divergence="adaptive_kl", alpha=0.5) for t in (plain, signed)))


def test_adaptive_kl_at_the_ends_and_with_one_sided_distance():
    student, teacher = logits(3, 40, torch.float64, 1), logits(3, 40, torch.float64, 2)
    forward = run(student, teacher, torch.ones(3), divergence="forward_kl")
    same(run(student, teacher, torch.ones(3), divergence="adaptive_kl", alpha=1.0), forward)
    same(run(student, teacher, torch.ones(3), divergence="adaptive_kl", alpha=torch.ones(3)), forward)
    # Where the sides agree on the head, only the reverse direction is left, and the infinite forward one is not formed.
    teacher = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).log()
    value, gradient = run(student, teacher, torch.ones(1), divergence="adaptive_kl", alpha=0.5)
    torch.testing.assert_close(value, torch.tensor([0.5 * math.log(2)], dtype=torch.float64))
    assert gradient.isfinite().all()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 60), st.floats(0, 1))
def test_adaptive_kl_with_many_ties(data, vocab, mu):
    grid = st.lists(st.integers(-4, 4), min_size=vocab, max_size=vocab)
    student, teacher = (torch.tensor([data.draw(grid)], dtype=torch.float64) for _ in range(2))
    mass = torch.sort(log_p(teacher)[0], descending=True).values.exp().cumsum(0)
    if ((mass - mu).abs() < 1e-9).any():
        return  # decided by rounding
    value, _ = run(student, teacher, torch.ones(1), divergence="adaptive_kl", alpha=mu)
    rows = log_softmax(teacher[0].numpy()), log_softmax(student[0].numpy())
    share = adaptive_share(*rows, mu)
    p, q = (np.exp(row) for row in rows)
    expected = ((1 - share) * p * (rows[0] - rows[1]) + share * q * (rows[1] - rows[0])).sum()
    np.testing.assert_allclose(value.item(), expected, rtol=1e-10, atol=1e-12)


def integer_masses(z):
    """The weights of token_mass.h, 2^((z - max z) log2 e) in units of 2^-44, step by step in float32."""
    x = np.maximum((z - z.max()) * np.float32(math.log2(math.e)), np.float32(-127))
    shifter = np.float32(12582912 + 127)
    shifted = x + shifter
    f = x - (shifted - shifter)
    poly = np.float32(0.001326472731307149)
    for c in (0.009671512991189957, 0.05550733581185341, 0.24022242426872253, 0.6931470036506653, 1.0):
        poly = poly * f + np.float32(c)
    grid = np.float32(1.5 * 2.0**-21)
    power = poly * (shifted.view(np.uint32) << np.uint32(23)).view(np.float32) + grid - grid
    return [int(w * 2.0**44) for w in power.astype(np.float64)]


def test_head_where_rounding_decides():
    """mu is the mass of a prefix to the last digit of float32: the head is that of integer masses all the same."""
    student, teacher = logits(400, 60, torch.float32, 1), logits(400, 60, torch.float32, 2)
    mu, shares = torch.empty(400), torch.empty(400, dtype=torch.float64)
    distance = (log_p(teacher).exp() - log_p(student).exp()).abs()
    for row, z in enumerate(teacher.numpy()):
        order, masses = np.lexsort((np.arange(60), -z)), integer_masses(z)
        cumulative = [sum(masses[v] for v in order[: n + 1]) for n in range(60)]
        mu[row] = cumulative[row % 20 + 1] / cumulative[-1]
        most = int(mu[row].item() * float(cumulative[-1]))
        head = [v for n, v in enumerate(order) if n == 0 or cumulative[n] <= most]
        shares[row] = 1 - distance[row, head].sum() / distance[row].sum()
    forward, reverse = (run(student, teacher, torch.ones(400), divergence=f"{d}_kl")[0] for d in ("forward", "reverse"))
    value, _ = run(student, teacher, torch.ones(400), divergence="adaptive_kl", alpha=mu)
    torch.testing.assert_close(value.double(), (1 - shares) * forward + shares * reverse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_masses_of_a_very_long_row_fit(dtype):
    """2^21 equal entries: at 2^-44 of the largest weight each, their masses would add up to 2^65."""
    vocab = 1 << 21
    teacher, student = torch.zeros(1, vocab, dtype=dtype), torch.zeros(1, vocab, dtype=dtype)
    student[0, -vocab // 4 :] = 1.0
    q = log_p(student).exp()[0]
    distance = (q - 1 / vocab).abs()
    share = distance[vocab // 2 :].sum() / distance.sum()
    forward, reverse = (run(student, teacher, torch.ones(1), divergence=f"{d}_kl")[0] for d in ("forward", "reverse"))
    value, _ = run(student, teacher, torch.ones(1), divergence="adaptive_kl")
    torch.testing.assert_close(value, ((1 - share) * forward + share * reverse).to(dtype), rtol=1e-4, atol=0)


# ---- interpolated


def test_interpolated_at_the_ends():
    student, teacher = logits(3, 40, torch.float32, 1), logits(3, 40, torch.float32, 2)
    forward = run(student, teacher, torch.ones(3), divergence="forward_kl")
    same(run(student, teacher, torch.ones(3), divergence="interpolated", alpha=1.0), forward)
    rows = run(student, teacher, torch.ones(3), divergence="interpolated", alpha=torch.tensor([0.0, 1.0, 0.5]))
    assert rows[0][0] == 0 and rows[1][0].abs().max() <= 1e-7
    torch.testing.assert_close(rows[0][1], forward[0][1])
    torch.testing.assert_close(rows[1][1], forward[1][1])
    assert 0 < rows[0][2] < forward[0][2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpolated_where_one_side_is_masked(dtype):
    """p_t is 0 where either side is: finite, whatever the vocabularies."""
    student, teacher = logits(2, 1500, dtype, 1), logits(2, 1500, dtype, 2)
    student[:, 3] = teacher[:, 1400] = teacher[:, :2] = student[:, :2] = -torch.inf
    options = dict(divergence="interpolated", alpha=0.3)
    for s, t in ((student, teacher), (student[:, :1200], teacher), (student, teacher[:, :1200])):
        assert_close(*run(s, t, torch.ones(2), **options), *oracle(s, t, torch.ones(2), **options), dtype)
    infinite = run(student, teacher, torch.ones(2), divergence="interpolated", alpha=torch.ones(2))
    assert infinite[0].isinf().all() and (infinite[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", (50, 500, 1e4))
def test_interpolated_of_sides_without_overlap(dtype, apart):
    """Large logarithms cancel in every entry of the blend: all digits are left."""
    student, teacher = logits(3, 1500, dtype, 1), logits(3, 1500, dtype, 2)
    student[:, ::2] += apart
    teacher[:, 1::2] += apart
    student[1, ::3] = teacher[1, ::5] = -torch.inf
    options = dict(divergence="interpolated", alpha=0.4)
    value, gradient = run(student, teacher, torch.ones(3), **options)
    assert_close(value, gradient, *oracle(student, teacher, torch.ones(3), **options), dtype)


# ---- both


@pytest.mark.parametrize("divergence", BOTH)
@pytest.mark.parametrize("bad", (-0.1, 1.1, math.nan))
def test_bad_alpha_spoils_its_row_only(divergence, bad):
    student, teacher = logits(3, 20, torch.float32, 1), logits(3, 20, torch.float32, 2)
    alpha = torch.tensor([0.3, bad, 0.3])
    value, gradient = run(student, teacher, torch.ones(3), divergence=divergence, alpha=alpha)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("divergence", BOTH)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_temperature_alpha_per_row_and_upstream(divergence, dtype):
    student, teacher, upstream = logits(4, 700, dtype, 1), logits(4, 700, dtype, 2), torch.tensor([1.0, -2.0, 0.5, 4.0])
    options = dict(divergence=divergence, temperature=2.5, alpha=torch.tensor([0.1, 0.4, 0.6, 0.9]))
    assert_close(*run(student, teacher, upstream, **options), *oracle(student, teacher, upstream, **options), dtype)


def test_largest_vocabulary():
    for divergence in BOTH:
        student, teacher = logits(1, 262144, torch.float32, 1), logits(1, 262144, torch.float32, 2)
        options = dict(divergence=divergence, alpha=0.6)
        ours, expected = (f(student, teacher, torch.ones(1), **options) for f in (run, oracle))
        assert_close(*ours, *expected, torch.float32)


def test_required_alpha_is_named():
    with pytest.raises(ValueError, match="interpolated needs alpha"):
        distillation_loss(torch.zeros(1, 3), torch.zeros(1, 3), divergence="interpolated")
