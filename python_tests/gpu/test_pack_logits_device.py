"""Packed records on a CUDA device: the bytes of the CPU, and what the CPU unpacks."""

from __future__ import annotations

import packing_cases as cases
import pytest
import torch

from distillm_ext.packing import CODECS, unpack

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("vocab,k", [(50, 64), (1000, 2), (151_936, 64), (20_000, 1024)])
def test_device_equals_host(codec, method, vocab, k):
    case = cases.make(24, vocab, k, method)
    host = case.compressed()
    packed = host.to("cuda").pack(codec)
    assert torch.equal(packed.cpu(), host.pack(codec))
    settings = dict(codec=codec, k=k, vocab_size=vocab, temperatures=(1.0, 2.0), method=method)
    got, expected = unpack(packed, **settings).to("cpu"), unpack(packed.cpu(), **settings)
    assert torch.equal(got.valid, expected.valid)
    assert torch.equal(got.ids.sort(-1).values, expected.ids.sort(-1).values)
    for name in ("logprobs", "log_norm", "tail_logprob", "label_logprob"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5, equal_nan=True)
