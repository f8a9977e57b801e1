"""Operators in a CUDA graph: captured once, replayed on other inputs. Run by `make gpu-check`."""

import subprocess
import sys

import pytest
import torch

from distillm_ext import DIVERGENCES, compress_logits, distillation_loss, sample_tokens

pytestmark = pytest.mark.gpu
ALPHA = {"interpolated": 0.4}  # the one without a default


def logits(seed, rows=6, vocab=50257):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).bfloat16().cuda()


def divergence(name):
    def call(student, teacher):
        loss, metrics = distillation_loss(
            student, teacher, divergence=name, alpha=ALPHA.get(name), reduction="none", return_metrics=True
        )
        return loss, *torch.autograd.grad(loss, student, torch.full_like(loss, 0.5)), metrics.teacher_entropy

    return call


def inplace(student, teacher):
    logits = student * 1
    loss = distillation_loss(logits, teacher, inplace=True)
    return loss, *torch.autograd.grad(loss, logits)


def compressed(student, teacher):
    found = compress_logits(teacher, 64)
    return found.ids, found.logprobs, distillation_loss(student, found, reduction="none")


def packed(student, teacher):
    return (compress_logits(teacher, 64).pack("q8"),)


def sampled(student, teacher):
    found = sample_tokens(teacher, temperature=0.8, top_k=50, top_p=0.9, seed=7, position=3)
    return found.tokens, found.logprobs


CALLS = {
    **{name: divergence(name) for name in DIVERGENCES},
    "inplace": inplace, "compress_logits": compressed, "pack": packed, "sample_tokens": sampled,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_is_a_call(name):
    """Bit for bit, after one call to load the kernels, which is what the documentation asks for."""
    call, student, teacher = CALLS[name], logits(1).requires_grad_(), logits(2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(student, teacher)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(student, teacher)
    for seed in (3, 5):
        with torch.no_grad():
            student.copy_(logits(seed))
            teacher.copy_(logits(seed + 1))
        graph.replay()
        for got, expected in zip(found, call(student, teacher), strict=True):
            assert torch.equal(got, expected)


def test_the_first_call_of_a_process_may_be_captured():
    """Nothing of ours has been launched yet: kernels are loaded and attributes set during the capture."""
    source = """
import torch
from distillm_ext import distillation_loss
student, teacher = (torch.randn(4, 50257, device="cuda", dtype=torch.bfloat16) for _ in range(2))
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = distillation_loss(student, teacher, reduction="none")
graph.replay()
assert torch.equal(loss, distillation_loss(student, teacher, reduction="none"))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
