"""Operator `logprob_divergence`: against eager float64, entries without a number, contract, autograd, torch.compile."""

import pytest
import torch
from logprob_cases import FORMS, assert_close, logprobs
from tiers import full

from distillm_ext.ops.logprob_divergence import logprob_divergence

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def call(x, y, weight, form):
    divergence, beta, floor = form
    return logprob_divergence(x, y, weight, divergence, beta=beta, probability_floor=floor)


def pair(rows=4, vocab=40, dtype=torch.float32, form=FORMS[0], teacher_dtype=None):
    teacher = logprobs(rows, vocab, torch.float64, seed=2)
    teacher = teacher if form[2] is None else teacher.exp()
    weight = torch.linspace(-1, 2, rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return logprobs(rows, vocab, dtype, 1).requires_grad_(), teacher.to(teacher_dtype or dtype), weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(form, dtype):
    """Unnormalised rows of odd lengths, beyond one tile too, and teachers of another dtype."""
    for rows, vocab in ((1, 1), (3, 2), (2, 33), (5, 1023), (3, 2500)):
        for teacher_dtype in (dtype,) if dtype == torch.float64 else (dtype, torch.float32):
            x, y, weight = pair(rows, vocab, dtype, form, teacher_dtype)
            loss = call(x, y, weight, form)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            assert_close(loss.detach(), gradient, x.detach(), y, weight, form)
            with torch.no_grad():
                torch.testing.assert_close(call(x, y, weight, form), loss, rtol=0, atol=0)


def test_rows_of_any_stride():
    x, y, weight = pair(6, 50)
    expected = call(x, y, weight, FORMS[4])
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for change in (lambda t: torch.cat([t, t], 1)[:, :50], lambda t: t.t().contiguous().t()):
        strided = change(x.detach()).requires_grad_()
        loss = call(strided, change(y), weight, FORMS[4])
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), strided)[0], gradient, rtol=0, atol=0)
    assert call(x[:0], y[:0], weight[:0], FORMS[4]).shape == (0,)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_weight_zero_is_not_read(form):
    x, y, _ = pair(3, 20, form=form)
    x = x.detach()
    x[1], y[1] = NAN, NAN
    loss = call(x.requires_grad_(), y, torch.tensor([1.0, 0.0, 1.0]), form)
    loss.sum().backward()
    assert loss[1] == 0 and (x.grad[1] == 0).all() and loss.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_entries_without_a_number(form, dtype):
    """-inf on both sides adds exactly 0; a NaN spoils the loss of its row and its own entry of the gradient alone."""
    x, y, _ = pair(3, 20, dtype, form)
    x = x.detach()
    without = call(x[:, :15], y[:, :15], None, form)
    x[:, 15:], y[:, 15:] = -INF, -INF if form[2] is None else 0
    x[1, 3], y[2, 4] = NAN, NAN
    loss = call(x.requires_grad_(), y, None, form)
    loss.sum().backward()
    torch.testing.assert_close(loss[0], without[0], rtol=1e-6, atol=1e-6)
    assert loss.isnan().tolist() == [False, True, True]
    assert x.grad.isnan().nonzero().tolist() == [[1, 3], [2, 4]] and (x.grad[:, 15:] == 0).all()


def test_infinite_by_definition():
    """q = 0 < p in forward_kl, p = 0 < q in reverse_kl; the gradient by the others stays what it is."""
    x, y = torch.tensor([[-1.0, -INF]], requires_grad=True), torch.tensor([[-1.0, -1.0]])
    loss = call(x, y, None, ("forward_kl", 0.5, None))
    loss.backward()
    assert loss.item() == INF
    torch.testing.assert_close(x.grad, -y.exp())
    assert call(y, x.detach(), None, ("reverse_kl", 0.5, None)).item() == INF
    assert call(x, y, None, ("generalized_js", 0.5, None)).isfinite().all()
    assert call(torch.full((1, 1), 90.0), torch.zeros(1, 1), None, ("reverse_kl", 0.5, None)).item() == INF


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    x, y, weight = pair(3, 7, torch.float64, form)
    assert torch.autograd.gradcheck(lambda x: call(x, y, weight, form), (x,))


@pytest.mark.parametrize("form", (FORMS[1], FORMS[4]))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("need_gradient", (True, False))
def test_opcheck(form, dtype, need_gradient):
    x, y, weight = pair(dtype=dtype, form=form)
    for side in (None, weight):
        arguments = (x if need_gradient else x.detach(), y, side, *form, need_gradient)
        torch.library.opcheck(torch.ops.distillm_ext.logprob_divergence.default, arguments)


@pytest.mark.parametrize("dynamic", [True, *full(False)])
@pytest.mark.parametrize("backend", ["aot_eager", *full("inductor")])
def test_compile_fullgraph(dynamic, backend):
    torch.compiler.reset()
    x, y, weight = pair(6, 50)

    def step(x, y, weight):
        return (call(x * 1.5, y, weight, FORMS[3]) * 2).sum()

    step(x, y, weight).backward()
    expected, x.grad = x.grad, None
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    compiled(x, y, weight).backward()
    torch.testing.assert_close(x.grad, expected)


def test_upstream_gradients_retained_graphs_and_second_derivatives():
    x, y, weight = pair()
    loss = call(x, y, weight, FORMS[4])
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0])
    (once,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    once = once.clone()
    (scaled,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
    torch.testing.assert_close(scaled, once * upstream[:, None])
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x)[0], once, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(call(x, y, weight, FORMS[4]).sum(), x, create_graph=True)


def test_direct_calls_are_checked():
    x, y, weight = pair()
    js, kl = FORMS[4], FORMS[0]
    cases = [
        ((x, y[:, :3], weight, js), "same shape"),
        ((x, y[:3], weight, js), "as many rows"),
        ((x.int(), y, weight, js), "student must be float32"),
        ((x, y.double(), weight, js), "float64 on both sides"),
        ((x, y, weight[:2], js), "weight must have shape"),
        ((x, y, weight.double(), js), "weight must have dtype"),
        ((x, y, weight, ("generalized_js", 1.0, None)), "beta must lie between 0 and 1"),
        ((x, y, weight, ("generalized_js", 0.5, 1e-3)), "probability_floor is an option of forward_kl"),
        ((x, y, weight, ("skew_kl", 0.5, None)), "none of forward_kl"),
    ]
    for arguments, match in cases:
        with pytest.raises(RuntimeError, match=match):
            call(*arguments)
    loss, _ = torch.ops.distillm_ext.logprob_divergence(x, y, weight, *kl, False)
    with pytest.raises(RuntimeError, match="need_gradient=False"):
        loss.sum().backward()
