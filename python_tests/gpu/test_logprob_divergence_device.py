"""The CUDA kernel of `logprob_divergence` on a real device, and Liger's losses over it."""

import pytest
import torch
from logprob_cases import FORMS, assert_close, logprobs

from distillm_ext.compat import liger
from distillm_ext.ops.logprob_divergence import logprob_divergence

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", (None, torch.float32))
def test_values_and_gradients(form, dtype, teacher_dtype):
    divergence, beta, floor = form
    for vocab in (7, 1023, 50257, 151936):
        x, teacher, weight = logprobs(3, vocab, dtype, 1), logprobs(3, vocab, seed=2), torch.tensor([1.0, -0.5, 2.0])
        y = (teacher if floor is None else teacher.exp()).to(teacher_dtype or dtype)
        leaf = x.cuda().requires_grad_()
        loss = logprob_divergence(leaf, y.cuda(), weight.cuda(), divergence, beta=beta, probability_floor=floor)
        loss.sum().backward()
        assert_close(loss.detach().cpu(), leaf.grad.cpu(), x, y, weight, form)


def test_nothing_synchronises():
    x, y = (logprobs(64, 50257, torch.bfloat16, seed).cuda().requires_grad_() for seed in (1, 2))
    labels = torch.arange(64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        liger.liger_jsd(x, y, labels).backward()
        liger.liger_kl_div(x, y, reduction="batchmean", log_target=True).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all() and y.grad is None
