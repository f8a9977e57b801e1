"""`inplace=True`: the gradient takes the place of the student's logits."""

import gc

import pytest
import torch
from divergence_cases import required

from distillm_ext import distillation_loss
from distillm_ext.functional import DIVERGENCES
from distillm_ext.ops.divergence import DivergenceOptions

ROWS, VOCAB, HIDDEN = 6, 50, 8


def make(dtype=torch.float32, rows=ROWS, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, teacher = (
        torch.randn(*size, generator=generator).to(dtype) for size in ((rows, HIDDEN), (vocab, HIDDEN), (rows, vocab))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), teacher


def both(make_logits, teacher, leaves, scale=None, **options):
    """Losses and gradients of the leaves with and without inplace."""
    results = []
    for inplace in (False, True):
        loss = distillation_loss(make_logits(), teacher, inplace=inplace, **required(options))
        value = loss.detach().clone()
        upstream = torch.ones_like(loss) if scale is None else scale
        gradients = torch.autograd.grad(loss, leaves, upstream)
        results.append((value, [g.clone() for g in gradients]))
    return results


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_same_numbers_as_the_plain_form(divergence, dtype, temperature):
    hidden, weight, teacher = make(dtype)
    labels = torch.tensor([1, 2, -100, 4, 5, 49])
    plain, inplace = both(
        lambda: hidden @ weight.t(), teacher, (hidden, weight), labels=labels, divergence=divergence,
        temperature=temperature, ce_weight=0.5,
    )  # fmt: skip
    torch.testing.assert_close(inplace, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_upstream_gradients_scale_the_rows(dtype):
    hidden, weight, teacher = make(dtype)
    scale = torch.tensor([1.0, 0.0, -2.0, 1.0, 0.5, 3.0])
    plain, inplace = both(lambda: hidden @ weight.t(), teacher, (hidden,), scale=scale, reduction="none")
    torch.testing.assert_close(inplace, plain, rtol=0, atol=0)
    plain, inplace = both(lambda: hidden @ weight.t(), teacher, (hidden,), scale=torch.tensor(3.0))
    torch.testing.assert_close(inplace, plain, rtol=0, atol=0)


VIEWS = {
    "three dimensions": lambda x: x.view(2, 3, VOCAB),
    "one position": lambda x: x[2],
    "all but the last": lambda x: x.view(2, 3, VOCAB)[:, :-1],
    "some entries": lambda x: x[:, 7:40],
    "every other row": lambda x: x[::2],
    "four dimensions": lambda x: x.view(2, 3, 1, VOCAB),
    "a copy": lambda x: x.view(3, 2, VOCAB).transpose(0, 1).reshape(6, VOCAB),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("unit", (True, False))
def test_views_of_the_head_s_output(view, unit):
    hidden, weight, teacher = make()
    teacher, take = VIEWS[view](teacher), VIEWS[view]
    scale = None if unit else torch.rand(teacher.shape[:-1])
    reduction = "mean" if unit else "none"
    plain, inplace = both(lambda: take(hidden @ weight.t()), teacher, (hidden, weight), scale, reduction=reduction)
    torch.testing.assert_close(inplace, plain, rtol=1e-6, atol=1e-8)


def test_the_logits_become_the_gradient_and_nothing_else_is_allocated():
    hidden, weight, teacher = make(rows=64, vocab=5000)
    logits = hidden @ weight.t()
    address = logits.data_ptr()
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = distillation_loss(logits, teacher, inplace=True)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated <= 2**14
    loss.backward()
    assert seen == [address]


def test_vocab_size_leaves_zeros_beyond():
    hidden, weight, teacher = make()
    plain, inplace = both(lambda: hidden @ weight.t(), teacher, (hidden, weight), vocab_size=33)
    torch.testing.assert_close(inplace, plain, rtol=0, atol=0)
    logits = hidden @ weight.t()
    distillation_loss(logits, teacher, vocab_size=33, inplace=True)
    assert (logits[:, 33:] == 0).all() and (logits[:, :33] != 0).all()


def test_rows_left_out_and_broken_rows():
    hidden, weight, teacher = make()
    labels = torch.tensor([1, -100, 2, 3, 4, 5])
    teacher[1], teacher[3] = torch.nan, torch.nan
    logits = hidden @ weight.t()
    loss = distillation_loss(logits, teacher, labels, reduction="none", inplace=True)
    assert loss.isnan().tolist() == [False, False, False, True, False, False]
    assert (logits[1] == 0).all() and logits[3].isnan().all() and logits[[0, 2, 4, 5]].isfinite().all()


def test_second_backward_is_refused():
    hidden, weight, teacher = make()
    loss = distillation_loss(hidden @ weight.t(), teacher, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True runs once"):
        loss.backward()
    loss = distillation_loss(hidden @ weight.t(), teacher, inplace=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autograd_notices_who_needs_the_logits_or_spoils_the_gradient():
    hidden, weight, teacher = make()
    squashed = torch.tanh(hidden @ weight.t())  # its backward needs what the gradient overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distillation_loss(squashed, teacher, inplace=True).backward()
    logits = hidden @ weight.t()
    loss = distillation_loss(logits, teacher, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_use_before_and_a_loss_used_twice():
    hidden, weight, teacher = make()
    results = []
    for inplace in (False, True):
        logits = hidden @ weight.t()
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        loss = distillation_loss(logits, teacher, inplace=inplace)
        (loss + 2 * loss).backward()
        results.append(hidden.grad)
        hidden.grad = weight.grad = None
        del entropy
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=0)


def test_without_gradients_nothing_is_overwritten():
    hidden, weight, teacher = make()
    with torch.no_grad():
        logits = hidden @ weight.t()
        kept = logits.clone()
        loss = distillation_loss(logits, teacher, inplace=True)
        assert torch.equal(logits, kept) and torch.equal(loss, distillation_loss(kept, teacher))


def test_what_cannot_be_overwritten_is_refused():
    hidden, weight, teacher = make()
    logits = (hidden @ weight.t()).detach()
    cases = {
        "do not require a gradient": logits,
        "are a leaf": logits.clone().requires_grad_(),
        "stride 1 along the vocabulary": (hidden @ weight.t()).t().contiguous().t(),
        "positions do not share memory": (hidden[:1] @ weight.t()).expand(ROWS, VOCAB),
    }
    for message, student in cases.items():
        with pytest.raises(ValueError, match=message):
            distillation_loss(student, teacher, inplace=True)


def test_compile_says_that_it_is_for_eager_mode():
    hidden, weight, teacher = make()

    def step(hidden):
        return distillation_loss(hidden @ weight.t(), teacher, inplace=True)

    with pytest.raises(Exception, match="eager mode"):
        torch.compile(step, fullgraph=True)(hidden)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("metrics", (True, False))
def test_opcheck(dtype, metrics):
    _, _, teacher = make(dtype)
    student, side = torch.randn(ROWS, VOCAB).to(dtype), torch.rand(ROWS)
    labels = torch.tensor([1, 2, -100, 4, 5, 6])
    for sides in ((None, None, None, None), (labels, side, side, side)):
        arguments = (student, teacher, *sides, *DivergenceOptions("skew_kl", 0.1, temperature=2.0), 40, metrics)
        torch.library.opcheck(torch.ops.distillm_ext.divergence_.default, arguments)
