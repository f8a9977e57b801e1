"""Log-probabilities and the eager float64 oracle of `logprob_divergence`."""

from __future__ import annotations

import torch
from torch import Tensor

# divergence, beta, probability_floor
FORMS = [
    ("forward_kl", 0.5, None),
    ("forward_kl", 0.5, 1e-3),
    ("reverse_kl", 0.5, None),
    ("generalized_js", 0.1, None),
    ("generalized_js", 0.5, None),
    ("generalized_js", 0.9, None),
]
ROUNDING = {torch.float64: 2.0**-50, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def logprobs(rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """[rows, vocab], a multiple of a distribution: its logarithms are moved by up to 2 in every row."""
    generator = torch.Generator().manual_seed(seed)
    shift = 2 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 1
    logits = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return (logits.log_softmax(-1) + shift).to(dtype)


def terms(x: Tensor, y: Tensor, divergence: str, beta: float, floor: float | None) -> Tensor:
    """The summands in float64, differentiable; finite entries."""
    x, y = x.double(), y.detach().double()
    p, log_p = (y.exp(), y) if floor is None else (y, y.clamp(min=floor).log())
    q = x.exp()
    if divergence == "forward_kl":
        return p * (log_p - x)
    if divergence == "reverse_kl":
        return q * (x - log_p)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * p * (log_p - log_m) + (1 - beta) * q * (x - log_m)


def oracle(
    x: Tensor, y: Tensor, weight: Tensor, divergence: str, beta: float, floor: float | None
) -> tuple[Tensor, Tensor]:
    """Losses [R] and the gradient of their sum, in float64."""
    leaf = x.detach().double().requires_grad_()
    loss = weight.double() * terms(leaf, y, divergence, beta, floor).sum(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_close(
    loss: Tensor, gradient: Tensor | None, x: Tensor, y: Tensor, weight: Tensor, form: tuple[str, float, float | None]
) -> None:
    """Against the oracle: values as sums of products with p and q round, gradients to the digits of their dtype."""
    expected_loss, expected_gradient = oracle(x, y, weight, *form)
    p = y.double().exp() if form[2] is None else y.double()
    masses = p + x.double().exp()
    unit = 2.0**-44 if x.dtype == torch.float64 else 2.0**-20
    scale = weight.double().abs() * (masses * (1 + x.double().abs() + p.log().abs().nan_to_num(0, 0))).sum(-1)
    assert ((loss.double() - expected_loss).abs() <= unit * scale).all()
    if gradient is None:
        return
    assert gradient.dtype == x.dtype and gradient.shape == x.shape
    floor = 4 * unit * weight.double().abs()[:, None] * masses
    allowed = ROUNDING[x.dtype] * expected_gradient.abs() + floor + torch.finfo(x.dtype).smallest_normal * 2.0**-10
    assert ((gradient.double() - expected_gradient).abs() <= allowed).all()
