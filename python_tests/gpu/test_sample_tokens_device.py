"""`sample_tokens` on a CUDA device: the tokens of the CPU, without exception, whatever reads the row."""

from __future__ import annotations

import pytest
import torch

from distillm_ext import sample_tokens

pytestmark = pytest.mark.gpu

RULES = (
    {}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}, {"top_p": 0.9}, {"top_p": 0.999},
    {"min_p": 0.05}, {"top_k": 900}, {"top_k": 3000, "top_p": 0.8}, {"top_p": 0.7, "min_p": 0.01},
)  # fmt: skip


def check(logits: torch.Tensor, **options) -> None:
    on_device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    got, expected = sample_tokens(logits.cuda(), **on_device), sample_tokens(logits, **options)
    assert torch.equal(got.valid.cpu(), expected.valid)
    assert torch.equal(got.tokens.cpu(), expected.tokens)
    for name in ("logprobs", "filtered_logprobs"):
        torch.testing.assert_close(
            getattr(got, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 31, 1023, 50257, 151936, 262144])
def test_device_equals_host(vocab, dtype):
    torch.manual_seed(vocab)
    for spread in (0.1, 3.0):
        logits = (torch.randn(16, vocab) * spread).to(dtype)
        logits[3] = torch.nan
        for position, rule in enumerate(RULES):
            check(logits, seed=torch.arange(16), position=position, **rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_rows_penalty_and_mask(dtype):
    torch.manual_seed(0)
    storage = (torch.randn(8, 40010) * 3).to(dtype)
    lists = {"previous_tokens": torch.randint(-2, 40000, (8, 30)), "banned": torch.rand(8, 40001) < 0.3}
    for rule in RULES:
        check(storage[:, 5:40006], seed=torch.arange(8), position=0, repetition_penalty=1.3, **lists, **rule)
