"""Every operator on every instruction set of the CPU: against its reference, and against the set of this process.

A set is chosen when the library is loaded, so each is a process of its own, one for all operators:

    DISTILLM_CPU_ISA=x86-64-v2 python test_instruction_sets.py RESULTS
"""

from __future__ import annotations

import os
import subprocess
import sys

import few_rows_cases as few_rows
import pytest
import test_divergence_row as head
import test_logprob_divergence as logprobs
import test_sample_tokens_op as sampling
import test_topk_logits as topk
import torch
from divergence_cases import required
from logprob_cases import FORMS as LOGPROB_FORMS
from logprob_cases import assert_close
from sparse_cases import FORMS, compressed, logits
from tiers import full

from distillm_ext import build_info, distillation_loss, sample_tokens
from distillm_ext.functional import DIVERGENCES
from distillm_ext.ops.few_rows_linear import few_rows_linear

# Of the largest entry of a gradient: what a rounding of another sum can move.
TOLERANCE = {torch.float32: 2**-14, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


def check_references() -> None:
    """Operators that have a reference of their own here."""
    for dtype in topk.DTYPES:
        for k in (1, 2, 63, 64, 1024):
            topk.test_against_reference(dtype, 5003, k)
    for order in ("ascending", "descending", "constant", "few values", "two peaks"):
        topk.test_adversarial_orders(order)
    for bad in (torch.nan, torch.inf, "all masked"):
        for where in (0, 77, 4999):
            topk.test_bad_rows_stay_alone(bad, where)
    topk.test_tiny_tail_masses_are_exact()
    for dtype in few_rows.DTYPES:
        x, weight, bias = few_rows.operands(7, 11, 45, dtype)
        few_rows.assert_exact(few_rows_linear(x, weight, bias), x, weight, bias)
    head.test_head_where_rounding_decides()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        head.test_ties_go_by_ascending_id(dtype)
    for form in LOGPROB_FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            x, y, weight = logprobs.pair(3, 2500, dtype, form)
            loss = logprobs.call(x, y, weight, form)
            assert_close(loss.detach(), torch.autograd.grad(loss.sum(), x)[0], x.detach(), y, weight, form)


def results() -> dict:
    """What all sets agree on: gradients to rounding, draws bit for bit."""
    gradients = []
    for dtype in TOLERANCE:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(5, 1500, generator=generator).mul(4).to(dtype) for _ in range(2))
        for divergence in DIVERGENCES:
            gradients.append(gradient(student, teacher, **required(dict(divergence=divergence))))
        for divergence, tail in FORMS:
            teacher_rows = compressed(logits(5, 1500, torch.float64, 2), 40, tail)
            gradients.append(gradient(logits(5, 1500, dtype, 1), teacher_rows, divergence=divergence, tail=tail))
    draws = []
    for dtype in sampling.DTYPES:
        rows, parameters = sampling.mixed_batch(rows=64, vocab=5003, dtype=dtype)
        draws += sampling.fields(sample_tokens(rows, **parameters))
    return {"isa": build_info()["cpu_isa"], "gradients": gradients, "draws": draws}


def gradient(student, teacher, **options):
    student = student.requires_grad_()
    return torch.autograd.grad(distillation_loss(student, teacher, **options), student)[0]


@pytest.fixture(scope="module")
def own():
    return results()


def bits(x):
    return x.view(torch.int32) if x.is_floating_point() else x


@pytest.mark.parametrize("isa", ["generic", "x86-64-v2", *full("x86-64-v3", "x86-64-v4")])
def test_every_operator(isa, own, tmp_path):
    environment = {**os.environ, "DISTILLM_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__, str(tmp_path / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    if found["isa"] != isa:
        pytest.skip(f"this processor has no {isa}")
    for a, b in zip(found["gradients"], own["gradients"], strict=True):
        assert (a.double() - b.double()).abs().max() <= TOLERANCE[a.dtype] * b.double().abs().max()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found["draws"], own["draws"], strict=True))


if __name__ == "__main__":
    check_references()
    torch.save(results(), sys.argv[1])
