"""The fused loss as PyTorch sees it: registration, autograd rules, needed gradients, torch.compile, autocast."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_cases import HELD
from linear_cases import HIDDEN, ROWS, VOCAB, Case, close, logits_of, make_case, value_and_gradients
from tiers import full
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillm_ext import TeacherHead, distillation_loss, linear_distillation_loss
from distillm_ext.functional import DIVERGENCES
from distillm_ext.ops.linear.call import flatten
from distillm_ext.ops.linear.operator import linear_divergence

# ---- gradients that are needed, and when


def gradient_flags(monkeypatch) -> list[tuple[bool, bool, bool]]:
    flags: list[tuple[bool, bool, bool]] = []

    def spy(call):
        flags.append((call.need_hidden, call.need_weight, call.need_bias))
        return linear_divergence(call)

    monkeypatch.setattr("distillm_ext.linear.linear_divergence", spy)
    return flags


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_needed_gradients_are_formed(monkeypatch, needed, reduction):
    flags, case = gradient_flags(monkeypatch), make_case()
    every = torch.autograd.grad(case.ours(reduction=reduction).sum(), case.leaves())
    tensors = (case.hidden, case.weight, case.bias)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    case.ours(reduction=reduction).sum().backward()
    assert flags[-1] == needed
    for tensor, need, gradient in zip(tensors, needed, every, strict=True):
        assert (tensor.grad is not None) == need
        if need:
            torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_without_grad_mode(monkeypatch, mode):
    flags, case = gradient_flags(monkeypatch), make_case()
    with mode():
        loss = case.ours()
    assert flags == [(False, False, False)] and not loss.requires_grad
    torch.testing.assert_close(loss, case.ours().detach())


def test_nothing_flows_to_the_teacher():
    case = make_case()
    leaves = [case.teacher.hidden.requires_grad_(), case.teacher.weight.requires_grad_()]
    weight = torch.rand(ROWS, requires_grad=True)
    case.ours(weight=weight).backward()
    assert all(x.grad is None for x in (*leaves, weight)) and case.weight.grad is not None


def test_unit_upstream_gradient_is_the_saved_buffer():
    case = make_case()
    loss = case.ours()
    addresses = [saved.data_ptr() for saved in loss.grad_fn.saved_tensors]
    loss.backward()
    assert [x.grad.data_ptr() for x in (case.hidden, case.weight, case.bias)] == addresses


def test_upstream_gradients_and_retain_graph():
    case = make_case()
    loss = case.ours()
    once = [g.clone() for g in torch.autograd.grad(loss, case.leaves(), retain_graph=True)]
    tripled = torch.autograd.grad(loss, case.leaves(), torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(list(tripled), [3 * g for g in once])
    again = torch.autograd.grad(loss, case.leaves())
    torch.testing.assert_close(list(again), once)


def test_second_derivative_is_refused():
    case = make_case()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.ours(), case.hidden, create_graph=True)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name not in HELD])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.pairwise
def test_gradcheck(divergence, softcap, reduction):
    case = make_case(torch.float64, vocab=9, teacher_vocab=9, shape=(4,))
    options = dict(divergence=divergence, ce_weight=0.3, chunk_rows=2, reduction=reduction)

    def loss(hidden, weight, bias):
        moved = replace(case, hidden=hidden, weight=weight, bias=bias, softcap=softcap, scale=0.7)
        return moved.ours(**options)

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


# ---- as PyTorch sees it


def captured_call(case: Case, monkeypatch, **options: Any):
    calls, answer = [], (torch.zeros(ROWS),) * 3
    with monkeypatch.context() as patch:
        patch.setattr("distillm_ext.linear.linear_divergence", lambda call: calls.append(call) or answer)
        case.ours(**options)
    return calls[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(rows=torch.tensor([1, 2, 4]), ce_weight=0.5, chunk_rows=2)])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(monkeypatch, dtype, options, bias):
    case = make_case(dtype, bias=bias, softcap=5.0)
    call = captured_call(case, monkeypatch, **options)
    torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, flatten(call))


def test_opcheck_per_row_and_inference(monkeypatch):
    case = make_case()
    call = captured_call(case, monkeypatch, reduction="none")
    call = call._replace(sides=call.sides._replace(weight=torch.rand(ROWS)))
    torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, flatten(call))
    with torch.no_grad():
        call = captured_call(case, monkeypatch)
    student = call.student._replace(hidden=call.student.hidden.detach(), weight=call.student.weight.detach(), bias=None)
    frozen = call._replace(student=student, need_ce=True)
    torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, flatten(frozen))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [True, *full(False)])
@pytest.mark.parametrize("backend", ["aot_eager", *full("inductor")])
def test_compile_fullgraph(reduction, dynamic, backend):
    torch.compiler.reset()
    case = make_case()

    def step(hidden, weight, bias, teacher_hidden, teacher_weight, labels):
        teacher = TeacherHead(teacher_hidden * 2, teacher_weight, softcap=10.0)
        loss = linear_distillation_loss(
            hidden * 2, weight, teacher, labels, student_bias=bias, chunk_rows=3, ce_weight=0.5, reduction=reduction
        )
        return loss.sum()

    inputs = (case.hidden, case.weight, case.bias, case.teacher.hidden, case.teacher.weight, case.labels)
    expected = value_and_gradients(step(*inputs), case)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for upstream in (None, torch.tensor(2.0)):
        value, gradients = value_and_gradients(compiled(*inputs), case, upstream)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(gradients, [g * (1 if upstream is None else upstream) for g in expected[1]])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected[0])


@pytest.mark.parametrize("bias", [True, False])
def test_autocast(bias):
    case = make_case(bias=bias, softcap=4.0)
    teacher = logits_of(case.teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(case.ours(chunk_rows=3), case)
        expected = value_and_gradients(replace(case, teacher=teacher).expected(), case)
    close(found[0], expected[0], 2e-2)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert gradient.dtype == torch.float32
        close(gradient, wanted, 3e-2)
    exact = value_and_gradients(case.ours(), case)
    assert (found[1][1] - exact[1][1]).abs().max() > 0  # the products were bfloat16's
    # The weight gradient itself is not rounded to bfloat16.
    assert not torch.equal(found[1][1], found[1][1].bfloat16().float())


def test_teacher_is_not_autocast():
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        from_head, from_logits = case.ours(), replace(case, teacher=logits_of(case.teacher).float()).ours()
        with torch.autocast("cpu", enabled=False):
            exact = logits_of(case.teacher)
        torch.testing.assert_close(from_head, replace(case, teacher=exact).ours(), rtol=1e-6, atol=0)
    assert abs(from_head - from_logits) > 1e-5  # bfloat16 logits would show


def test_float64_is_left_alone_by_autocast():
    case = make_case(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.ours(), case.ours()) and case.ours().dtype == torch.float64


def test_tied_embedding_gets_both_gradients():
    table = torch.nn.Embedding(VOCAB, HIDDEN)
    ids, teacher = torch.arange(ROWS), torch.randn(ROWS, VOCAB)
    distillation_loss(table(ids) @ table.weight.t(), teacher).backward()
    expected, table.weight.grad = table.weight.grad, None
    linear_distillation_loss(table(ids), table.weight, teacher, chunk_rows=2).backward()
    torch.testing.assert_close(table.weight.grad, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    case = make_case()
    expected = value_and_gradients(case.ours(chunk_rows=2), case)

    def run(hidden, weight, bias):
        return replace(case, hidden=hidden.tanh().atanh(), weight=weight, bias=bias).ours(chunk_rows=2)

    loss = checkpoint(run, case.hidden, case.weight, case.bias, use_reentrant=use_reentrant)
    loss.backward()
    torch.testing.assert_close([x.grad for x in case.leaves()], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], -1)[..., :HIDDEN]])
def test_strided_inputs(layout: Callable[[Tensor], Tensor]):
    case = make_case()
    expected = value_and_gradients(case.ours(), case)
    strided = replace(case, hidden=layout(case.hidden.detach()).requires_grad_(),
                      weight=layout(case.weight.detach()).requires_grad_())  # fmt: skip
    assert not strided.hidden.is_contiguous() and not strided.weight.is_contiguous()
    torch.testing.assert_close(value_and_gradients(strided.ours(chunk_rows=2), strided), expected)
