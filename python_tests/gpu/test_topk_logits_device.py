"""`compress_logits` on a real device against the float64 reference on the CPU. Run by `make gpu-check`."""

import pytest
import torch

from distillm_ext import capture_from_hidden, compress_logits
from distillm_ext.reference.compression import compress_logits_reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(logits, k, exact=True, **options):
    on_device = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = compress_logits(logits.cuda(), k, **on_device).to("cpu")
    expected = compress_logits_reference(logits.double(), k, **options)
    assert torch.equal(found.valid, expected.valid)
    same = (found.ids == expected.ids).all(-1)
    assert same.all() if exact else same.float().mean() >= 0.9  # a draw may fall within rounding of a boundary
    for name in ("logprobs", "log_norm", "tail_logprob", "label_logprob"):
        if getattr(expected, name) is not None:
            got, wanted = getattr(found, name).double()[same], getattr(expected, name)[same]
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=5e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 7, 1023, 32000, 50257, 151936))
@pytest.mark.parametrize("k", (1, 64, 200, 1024))
def test_topk(dtype, vocab, k):
    logits = (torch.randn(5, vocab) * 3).to(dtype)
    logits[1, 0] = torch.nan
    check(logits, k, temperatures=(1.0, 2.0, 0.5, 3.0, 4.0), labels=torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (7, 1023, 50257, 151936))
def test_sample(dtype, vocab):
    logits = (torch.randn(20, vocab) * 3).to(dtype)
    check(logits, 24, exact=False, method="sample", position=torch.arange(20), seed=3, temperatures=(1.0, 2.0))


@pytest.mark.parametrize("order", (1, -1))
def test_sorted_rows(order):
    logits = torch.linspace(-20, 20, 50257)[None]
    check(logits if order == 1 else logits.flip(1), 64)
    check(logits[:, :3000], 3000)


def test_layouts_and_repeats():
    logits = torch.randn(6, 1001).bfloat16().cuda()
    expected = compress_logits(logits, 9)
    offset = torch.cat([torch.zeros(3, dtype=logits.dtype, device="cuda"), logits.flatten()])[3:].view(6, 1001)
    for view in (offset, logits.t().contiguous().t(), torch.cat([logits, logits], 1)[:, :1001], logits):
        found = compress_logits(view, 9)
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.tail_logprob, expected.tail_logprob, rtol=0, atol=2e-6)
    again = compress_logits(logits, 9)
    assert torch.equal(again.tail_logprob, expected.tail_logprob)


def test_capture_from_hidden():
    hidden, weight = torch.randn(50, 64, device="cuda"), torch.randn(5000, 64, device="cuda")
    found, expected = capture_from_hidden(hidden, weight, 8, chunk_rows=16), compress_logits(hidden @ weight.t(), 8)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-2, atol=1e-2)
