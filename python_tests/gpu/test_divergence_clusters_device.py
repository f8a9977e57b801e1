"""What the CUDA kernel of `divergence` does in clusters of blocks, and what stands on it: on a real device."""

import pytest
import torch

from distillm_ext import DIVERGENCES, distillation_loss, linear_distillation_loss, reference

pytestmark = pytest.mark.gpu
ALPHA = {"interpolated": 0.4}  # the one without a default
VOCAB = 152064  # a row pair in bfloat16 takes eight blocks where there are clusters


def pair(rows, vocab=VOCAB, dtype=torch.bfloat16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(rows, vocab, generator=generator) * 3).to(dtype) for _ in range(2))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_in_place_equals_a_new_gradient(divergence):
    """Every member, with metrics, at a vocabulary of a whole cluster."""
    student, teacher = (x.cuda() for x in pair(6))
    results = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        loss, metrics = distillation_loss(
            leaf * 1, teacher, inplace=inplace, return_metrics=True, divergence=divergence, alpha=ALPHA.get(divergence)
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics.teacher_entropy, metrics.student_entropy))
    for fresh, replaced in zip(*results, strict=True):
        assert torch.equal(fresh, replaced)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_inputs(divergence):
    student, _ = pair(4)
    leaf = student.cuda().requires_grad_()
    loss = distillation_loss(leaf, student.cuda(), reduction="none", divergence=divergence, alpha=ALPHA.get(divergence))
    loss.sum().backward()
    assert loss.abs().max() <= 1e-6 and leaf.grad.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_metrics(dtype):
    student, teacher = pair(6, dtype=dtype)
    teacher[0] = student[0]
    _, metrics = distillation_loss(student.cuda(), teacher.cuda(), temperature=2.0, return_metrics=True)
    for side, entropy in ((teacher, metrics.teacher_entropy), (student, metrics.student_entropy)):
        log_p = torch.log_softmax(side.double() / 2, -1)
        torch.testing.assert_close(entropy.cpu().double(), -(log_p.exp() * log_p).sum(-1), rtol=3e-5, atol=3e-5)
    assert torch.equal(metrics.top1_agreement.cpu(), (student.argmax(-1) == teacher.argmax(-1)).float())


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9, 1.0])
def test_head_with_ties(mu):
    """adaptive_kl where many logits are equal, on both sides of the head's boundary."""
    student, teacher = pair(4, dtype=torch.float32)
    teacher = teacher.round()
    loss = distillation_loss(student.cuda(), teacher.cuda(), divergence="adaptive_kl", alpha=mu, reduction="none")
    expected = reference.per_token_divergence(student.double(), teacher.double(), divergence="adaptive_kl", alpha=mu)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_head_of_flat_rows(vocab, spread):
    """adaptive_kl where thousands of entries are the head."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        (torch.randn(4, vocab, generator=generator) * spread).to(torch.bfloat16).requires_grad_(i == 0)
        for i in range(2)
    )
    on_device = student.detach().cuda().requires_grad_()
    loss = distillation_loss(on_device, teacher.cuda(), divergence="adaptive_kl", reduction="none")
    loss.sum().backward()
    expected = distillation_loss(student, teacher, divergence="adaptive_kl", reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_device.grad.cpu(), student.grad, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["skew_kl", "adaptive_kl"])
def test_linear_loss(dtype, divergence):
    """Value and gradients of the fused loss against `distillation_loss` on logits formed whole."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"student": (37, 48), "teacher": (37, 64), "head": (5003, 48), "teacher_head": (5003, 64)}
    sides = {name: (torch.randn(shape, generator=generator) * 0.5).to(dtype).cuda() for name, shape in shapes.items()}
    labels = torch.randint(0, 5003, (37,), generator=generator).cuda()
    labels[3] = -100
    results = []
    for fused in (True, False):
        hidden, head = (sides[name].clone().requires_grad_() for name in ("student", "head"))
        teacher_logits = sides["teacher"] @ sides["teacher_head"].T
        if fused:
            loss = linear_distillation_loss(
                hidden, head, teacher_logits, labels, divergence=divergence, ce_weight=0.3, chunk_rows=8
            )
        else:
            loss = distillation_loss(hidden @ head.T, teacher_logits, labels, divergence=divergence, ce_weight=0.3)
        (3 * loss).backward()
        results.append((loss.detach(), hidden.grad, head.grad))
    tolerance = 2e-4 if dtype == torch.float32 else 3e-2
    for fused, whole in zip(*results, strict=True):
        difference = (fused.float() - whole.float()).norm()
        assert difference <= tolerance * whole.float().norm()
