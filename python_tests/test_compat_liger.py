"""The stand-ins for Liger-Kernel's losses against their formulas, log-probabilities being what is differentiated."""

import pytest
import torch
from torch.nn import functional as F

from distillm_ext import distillation_loss
from distillm_ext.compat import liger

V = 53
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def logprobs(seed, dtype=torch.float64, shift=0.0, rows=14):
    """exp of a row sums to exp(shift)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, V, generator=generator, dtype=torch.float64)
    return (logits.log_softmax(-1) + shift).to(dtype)


def labels():
    chosen = torch.randint(V, (14,), generator=torch.Generator().manual_seed(3))
    chosen[:3] = chosen[9] = -100
    return chosen


def jsd_formula(log_q, log_p, counted, beta):
    """beta KL(P || M) + (1 - beta) KL(Q || M); the ends are KL(P || Q) and KL(Q || P). Mean over counted rows."""
    p, q = log_p.exp(), log_q.exp()
    if beta in (0.0, 1.0):
        rows = (p * (log_p - log_q) if beta == 0 else q * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    return rows[counted].sum() / max(int(counted.sum()), 1)


def assert_same(leaf, ours, theirs, exact_leaf, upstream=1.0):
    """Value and gradient of `ours` by `leaf` and of `theirs`, in float64, by `exact_leaf`."""
    tolerance = TOLERANCE[leaf.dtype]
    (found,), (expected,) = (
        torch.autograd.grad(x * upstream, y, retain_graph=True) for x, y in ((ours, leaf), (theirs, exact_leaf))
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    assert found.dtype == leaf.dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("beta", (0.0, 0.1, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("shift", (0.0, -1.0, 0.7))
@pytest.mark.parametrize("dtype", DTYPES)
def test_jsd_by_log_probabilities(beta, shift, dtype):
    """Of distributions and of what sums to something else on the student's side; labelled rows or all."""
    leaf = logprobs(1, dtype, shift).requires_grad_()
    exact, target = leaf.detach().double().requires_grad_(), logprobs(2, dtype)
    for shift_labels in (None, labels(), labels().int()):
        counted = torch.ones(14, dtype=torch.bool) if shift_labels is None else shift_labels != -100
        theirs = jsd_formula(exact, target.double(), counted, beta)
        forms = (
            liger.liger_jsd(leaf, target, shift_labels, beta),
            liger.LigerJSD(beta)(leaf, target, shift_labels),
            liger.LigerJSDFunction.apply(leaf, target, shift_labels, beta, -100),
        )
        for upstream, ours in zip((1.0, 2.0, -0.5), forms, strict=True):
            assert ours.dtype == dtype and ours.shape == ()
            assert_same(leaf, ours, theirs, exact, upstream)


def test_jsd_ignores_the_index_it_is_told():
    leaf, target, chosen = logprobs(1).requires_grad_(), logprobs(2), labels().abs() % 7
    theirs = jsd_formula(exact := leaf.detach().requires_grad_(), target, chosen != 2, 0.5)
    assert_same(leaf, liger.LigerJSD(ignore_index=2)(leaf, target, chosen), theirs, exact)
    loss = liger.liger_jsd(leaf, target, torch.full((14,), -100))
    loss.backward()
    assert loss == 0 and (leaf.grad == 0).all()


@pytest.mark.parametrize("reduction", ("batchmean", "sum", "mean"))
@pytest.mark.parametrize("log_target", (False, True))
@pytest.mark.parametrize("shift", (0.0, 0.7))
@pytest.mark.parametrize("dtype,target_dtype", [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)])
def test_kl_by_log_probabilities(reduction, log_target, shift, dtype, target_dtype):
    leaf = logprobs(1, dtype).requires_grad_()
    target = logprobs(2, target_dtype, shift)
    target = target if log_target else target.exp()
    exact = leaf.detach().double().requires_grad_()
    theirs = F.kl_div(exact, target.double(), reduction=reduction, log_target=log_target)
    forms = (
        liger.liger_kl_div(leaf, target, reduction=reduction, log_target=log_target),
        liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)(leaf, target),
        liger.LigerKLDivLossFunction.apply(leaf, target, reduction, log_target),
    )
    for upstream, ours in zip((1.0, 2.0, -0.5), forms, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_same(leaf, ours, theirs, exact, upstream)


@pytest.mark.parametrize("log_target", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_entry_by_entry(log_target, dtype):
    leaf, target = logprobs(1, dtype).requires_grad_(), logprobs(2, dtype, 0.7)
    target = target if log_target else target.exp()
    exact = leaf.detach().double().requires_grad_()
    theirs = F.kl_div(exact, target.double(), reduction="none", log_target=log_target)
    ours = liger.LigerKLDIVLoss(reduction="none", log_target=log_target)(leaf, target)
    assert ours.shape == leaf.shape and ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    upstream = logprobs(3)
    assert_same(leaf, (ours * upstream.to(ours.dtype)).sum(), (theirs * upstream).sum(), exact)


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_kl_of_probabilities_below_eps(reduction):
    """Their logarithm is taken of eps, in every form; one of 0 adds 0."""
    leaf = logprobs(1).requires_grad_()
    target = logprobs(2).exp()
    target[:, :5] = 0
    for eps in (0.0, 1e-10, 1e-2):
        exact = leaf.detach().requires_grad_()
        theirs = torch.where(target == 0, 0.0, target * (target.clamp(min=max(eps, 1e-300)).log() - exact)).sum()
        forms = (
            liger.liger_kl_div(leaf, target, reduction=reduction, eps=eps),
            liger.LigerKLDIVLoss(eps, reduction=reduction)(leaf, target),
            liger.LigerKLDivLossFunction.apply(leaf, target, reduction, False, eps),
        )
        for ours in forms:
            assert_same(leaf, ours.sum(), theirs, exact)


@pytest.mark.parametrize(
    "loss", (liger.liger_jsd, lambda x, y: liger.liger_kl_div(x, y, reduction="none", log_target=True))
)
def test_entries_without_probability(loss):
    """A vocabulary masked on both sides: 0 log 0 counts 0, and its gradient with it."""
    leaf, target = logprobs(1), logprobs(2)
    leaf[:, 40:], target[:, 40:] = -torch.inf, -torch.inf
    leaf.requires_grad_()
    value = loss(leaf, target).sum()
    value.backward()
    assert value.isfinite() and leaf.grad[:, :40].isfinite().all() and (leaf.grad[:, 40:] == 0).all()


def test_gradient_is_that_of_logits_and_a_multiple_of_q():
    """By log q the gradient is g + q sum G, g the one by the logits; the log-softmax takes the multiple away."""
    leaf = logprobs(1).requires_grad_()
    target, q = logprobs(2), logprobs(1).exp()
    (by_logprobs,) = torch.autograd.grad(liger.liger_jsd(leaf, target, beta=0.3), leaf)
    (by_logits,) = torch.autograd.grad(distillation_loss(leaf, target, divergence="generalized_js", beta=0.3), leaf)
    torch.testing.assert_close(by_logits + q * by_logprobs.sum(-1, keepdim=True), by_logprobs)
    assert (by_logprobs - by_logits).abs().max() > 1e-3
    logits = (3 + logprobs(1)).requires_grad_()
    (through,) = torch.autograd.grad(liger.liger_jsd(logits.log_softmax(-1), target, beta=0.3), logits)
    torch.testing.assert_close(through, by_logits)


def test_float16_keeps_its_digits_under_a_gradient_scaler():
    """What the division by the rows takes below float16's range, the scaler's factor brings back."""
    leaf, target = logprobs(1, torch.float16, rows=4096).requires_grad_(), logprobs(2, torch.float16, rows=4096)
    exact = leaf.detach().double().requires_grad_()
    theirs = jsd_formula(exact, target.double(), torch.ones(4096, dtype=torch.bool), 0.5) * 2.0**15
    (expected,) = torch.autograd.grad(theirs, exact)
    (found,) = torch.autograd.grad(liger.liger_jsd(leaf, target).float() * 2.0**15, leaf)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-6)


def test_views_dtypes_and_compilers():
    leaf, target = logprobs(1, torch.float32).requires_grad_(), logprobs(2)
    theirs = liger.liger_jsd(leaf, target.float())
    (expected,) = torch.autograd.grad(theirs, leaf)
    columns = leaf.detach().t().contiguous().t().requires_grad_()
    compiled = torch.compile(liger.liger_jsd, fullgraph=True)
    for function, x, y in (
        (liger.liger_jsd, columns, target.float().t().contiguous().t()),
        (liger.liger_jsd, leaf, target),  # float64 on one side: computed in float64
        (compiled, leaf, target.float()),
    ):
        ours = function(x, y)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x)[0], expected)
    assert not liger.liger_jsd(leaf.detach(), target.float().requires_grad_()).requires_grad
    empty = leaf.detach()[:0].requires_grad_()
    for loss in (liger.liger_jsd(empty, target[:0].float()), liger.liger_kl_div(empty, target[:0].float())):
        assert loss == 0


def test_arguments_are_checked():
    x, y = logprobs(1, torch.float32), logprobs(2, torch.float32)
    cases = [
        ((x.tolist(), y), {}, TypeError, "input must be a tensor"),
        ((x, y.int()), {}, TypeError, "target must be float32"),
        ((x.view(2, 7, V), y.view(2, 7, V)), {}, ValueError, r"input must have shape \[BT, V\].*flatten"),
        ((x, y[:, :9]), {}, ValueError, "target must have the shape of input"),
        ((x, y.to("meta")), {}, ValueError, "target must be on the device"),
        ((x.to_sparse(), y), {}, TypeError, "input must be a dense tensor"),
    ]
    for function in (liger.liger_jsd, liger.liger_kl_div):
        for arguments, options, error, match in cases:
            with pytest.raises(error, match=match):
                function(*arguments, **options)
    of_jsd = [
        (dict(beta=1.5), ValueError, r"beta must lie in \[0, 1\]"),
        (dict(beta="half"), TypeError, "beta must be a number"),
        (dict(ignore_index=0.5), TypeError, "ignore_index must be an int"),
        (dict(shift_labels=[1] * 14), TypeError, "shift_labels must be a tensor"),
        (dict(shift_labels=torch.zeros(14)), TypeError, "shift_labels must be an integer tensor"),
        (dict(shift_labels=labels()[:3]), ValueError, r"shift_labels must have shape \[14\]"),
        (dict(shift_labels=labels().to("meta")), ValueError, "shift_labels must be on the device"),
    ]
    of_kl = [
        (dict(reduction="median"), ValueError, "reduction must be"),
        (dict(eps=-1.0), ValueError, "eps must be finite and not negative"),
        (dict(eps="small"), TypeError, "eps must be a number"),
    ]
    for function, options_of in ((liger.liger_jsd, of_jsd), (liger.liger_kl_div, of_kl)):
        for options, error, match in options_of:
            with pytest.raises(error, match=match):
                function(x, y, **options)
