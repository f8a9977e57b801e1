"""The CUDA kernel of `sparse_divergence` on a real device, against the CPU kernel and the dense loss."""

import pytest
import torch
from sparse_cases import FORMS, compressed, logits, oracle

from distillm_ext import distillation_loss, linear_distillation_loss

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.mark.parametrize("divergence,tail", FORMS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("vocab,k", ((7, 7), (1023, 64), (50257, 64), (151936, 1024)))
def test_value_and_gradient(divergence, tail, dtype, vocab, k):
    student, teacher = logits(3, vocab, dtype, 1), compressed(logits(3, vocab, torch.float32, 2), k, tail)
    upstream, options = torch.tensor([1.0, -0.5, 2.0]), dict(divergence=divergence, tail=tail)
    value, gradient = oracle(student, teacher, upstream, **options)
    for inplace in (False, True):
        leaf = student.cuda().requires_grad_()
        loss = distillation_loss(leaf * 1, teacher.to("cuda"), reduction="none", inplace=inplace, **options)
        loss.backward(upstream.cuda())
        torch.testing.assert_close(loss.cpu().double(), value, rtol=5e-5, atol=1e-5)
        allowed = ROUNDING[dtype] * gradient.abs() + 2e-5 * gradient.abs().amax(-1, keepdim=True) + 3e-6
        assert ((leaf.grad.cpu().double() - gradient).abs() <= allowed).all()


def test_repeated_runs_agree_bit_for_bit_and_do_not_synchronise():
    student = logits(64, 50257, torch.bfloat16, 1).cuda()
    teacher = compressed(logits(64, 50257, torch.float32, 2), 64).to("cuda")
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            leaf = student.detach().requires_grad_()
            loss = distillation_loss(leaf, teacher, reduction="none")
            loss.backward(torch.ones_like(loss))
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("tail", ("bucket", "sampled"))
def test_through_the_head_chunk_by_chunk(tail):
    """The loss of materialised logits and its gradients, with packed bytes as what crossed to the device."""
    hidden, weight = (logits(rows, 64, torch.float32, seed).cuda() * 0.3 for rows, seed in ((33, 1), (5003, 2)))
    teacher = compressed(logits(33, 5003, torch.float32, 3), 16, tail)
    packed = teacher.pack("q8").cuda()
    teacher = teacher.unpack(packed, codec="q8", k=16, vocab_size=5003, method=teacher.method)
    labels = torch.arange(33, device="cuda")
    labels[::3] = -100
    results = []
    for fused in (True, False):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        if fused:
            loss = linear_distillation_loss(*leaves, teacher, labels, tail=tail, chunk_rows=8)
        else:
            loss = distillation_loss(leaves[0] @ leaves[1].t(), teacher, labels, tail=tail)
        results.append((loss.detach(), torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=1e-5)
