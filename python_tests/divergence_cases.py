"""What the tests of `distillation_loss` share: logits, both sides of a comparison, tolerances."""

import torch

from distillm_ext import distillation_loss, reference

SKEWED = ("skew_kl", "skew_reverse_kl")
ALWAYS_FINITE = (*SKEWED, "generalized_js", "total_variation", "alpha_beta", "interpolated")
# Infinite where the student, or the teacher, lacks an entry that the other side has.
INFINITE_WITHOUT = {
    "forward_kl": ("student",),
    "reverse_kl": ("teacher",),
    "symmetric_kl": ("student", "teacher"),
    "token_adaptive": ("student", "teacher"),
    "adaptive_kl": ("student", "teacher"),
}
# What these hold constant, finite differences do not see; test_divergence_row.py holds it for them.
HELD = ("token_adaptive", "adaptive_kl", "interpolated")
INFINITE_CASES = [(name, side) for name, sides in INFINITE_WITHOUT.items() for side in sides]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest relative error of a gradient: rounding of the storage format, or of float arithmetic.
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def logits(rows, vocab, dtype, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * scale).to(dtype)


def required(options):
    """The options, with the hyper-parameter that has no default where it is not given."""
    return {"alpha": 0.4, **options} if options.get("divergence") == "interpolated" else options


def oracle(student, teacher, upstream, **options):
    """Per-position values and the gradient for an upstream gradient, in float64."""
    student = student.detach().double().requires_grad_()
    value = reference.per_token_divergence(student, teacher.double(), **required(options))
    (value * upstream.double()).sum().backward()
    return value.detach(), student.grad


def run(student, teacher, upstream, **options):
    student = student.detach().clone().requires_grad_()
    value = distillation_loss(student, teacher, reduction="none", **required(options))
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
