"""`sparse_divergence` as PyTorch sees it: registration, autograd, torch.compile, checks."""

import pytest
import torch
from sparse_cases import FORMS, compressed, edited, logits, run
from tiers import full

from distillm_ext import distillation_loss
from distillm_ext.ops.divergence import DivergenceOptions, RowSides
from distillm_ext.ops.sparse_divergence import CompressedRows
from distillm_ext.ops.sparse_divergence import sparse_divergence as sparse_divergence_op


def pair(rows=4, vocab=40, k=6, dtype=torch.float32, tail="bucket"):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return logits(rows, vocab, dtype, 1).requires_grad_(), compressed(logits(rows, vocab, wide, 2), k, tail)


def rows_of(teacher, tail="bucket"):
    norm, rest = teacher.log_norm[:, 0].contiguous(), teacher.tail_logprob[:, 0].contiguous()
    return CompressedRows(teacher.ids, teacher.logprobs, norm, rest, teacher.counts, tail, teacher.vocab_size)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("tail", ("bucket", "sampled"))
@pytest.mark.parametrize("need_gradient", (True, False))
def test_opcheck(dtype, tail, need_gradient):
    student, teacher = pair(dtype=dtype, tail=tail)
    side = torch.float64 if dtype == torch.float64 else torch.float32
    ids, logprobs, log_norm, tail_logprob, counts, _, vocab = rows_of(teacher, tail)
    labels, per_row = torch.tensor([1, 2, -100, 3]), torch.rand(4, dtype=side)
    for sides, ce_weight in (((None,) * 4, 0.0), ((labels, per_row, per_row, per_row), 0.5)):
        name, *options = DivergenceOptions("skew_kl", 0.1, ce_weight=ce_weight)
        arguments = (
            student if need_gradient else student.detach(), ids, logprobs, log_norm, tail_logprob, counts, *sides,
            name, tail, *options, 30, vocab,
        )  # fmt: skip
        operators = torch.ops.distillm_ext
        torch.library.opcheck(operators.sparse_divergence.default, (*arguments, need_gradient))
        in_place = (student.detach().clone(), *arguments[1:])
        torch.library.opcheck(operators.sparse_divergence_.default, in_place)


@pytest.mark.parametrize("divergence,tail", FORMS)
def test_gradcheck(divergence, tail):
    """Finite differences in float64, cross-entropy and an ignored row included."""
    student, teacher = pair(5, 12, 4, torch.float64, tail)
    labels = torch.tensor([1, 2, -100, 3, int(teacher.ids[4, 0])])
    for temperature in (1.0,) if tail == "sampled" else (1.0, 2.5):

        def loss(x, temperature=temperature):
            options = dict(divergence=divergence, tail=tail, temperature=temperature)
            return distillation_loss(x, teacher, labels, ce_weight=0.3, reduction="none", **options)

        assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("divergence,tail", (("skew_kl", "bucket"), ("forward_kl", "sampled")))
@pytest.mark.parametrize("dynamic", [True, *full(False)])
@pytest.mark.parametrize("backend", ["aot_eager", *full("inductor")])
def test_compile_fullgraph(divergence, tail, dynamic, backend):
    torch.compiler.reset()
    student, teacher = pair(6, 50, tail=tail)
    labels = torch.tensor([1, -100, 3, 4, 5, 6])

    def step(hidden, teacher, labels):
        return distillation_loss(hidden * 2.0, teacher, labels, divergence=divergence, tail=tail, ce_weight=0.5)

    step(student, teacher, labels).backward()
    expected, student.grad = student.grad, None
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    for _ in range(2):
        student.grad = None
        compiled(student, teacher, labels).backward()
        torch.testing.assert_close(student.grad, expected)
    (compiled(student, teacher, labels) * 3).backward()
    torch.testing.assert_close(student.grad, expected * 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(student, teacher, labels), step(student, teacher, labels))


@pytest.mark.parametrize("divergence,tail", FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_in_place(divergence, tail, dtype):
    """The gradient takes the place of the logits, views of a wider tensor included, cut vocabularies too."""
    leaf, teacher = pair(6, 60, 8, dtype, tail)
    labels, upstream = torch.tensor([1, -100, 3, 4, 5, 6]).view(2, 3), torch.tensor([[1.0, 2.0, -1.0], [0.5, 1.0, 1.0]])
    for options in (dict(ce_weight=0.5), dict(temperature=1.0 if tail == "sampled" else 2.5, ce_weight=0.5)):
        gradients = []
        for inplace in (False, True):
            x = leaf.detach().requires_grad_()
            wide = torch.cat([x, x], -1).view(2, 3, 120)
            logits = wide[..., :60]
            loss = distillation_loss(
                logits, teacher.reshape(2, 3), labels, divergence=divergence, tail=tail, reduction="none",
                inplace=inplace, **options,
            )  # fmt: skip
            loss.backward(upstream)
            gradients.append(x.grad)
            if inplace:
                assert (wide[0, 1, :60] == 0).all()  # the ignored row's gradient is where its logits were
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward(upstream)


def test_autograd_notices_who_needs_the_overwritten_logits():
    x, teacher = pair()
    squashed = torch.tanh(x)  # its backward needs what the gradient overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distillation_loss(squashed, teacher, inplace=True).backward()


def test_blocks_of_rows_are_not_copied():
    """logits[:, :-1] of a batch, as language models are trained: the operator takes two strides."""
    student, teacher = logits(8, 50, seed=1).view(2, 4, 50).requires_grad_(), compressed(logits(6, 50, seed=2), 8)
    sparse = teacher.reshape(2, 3)
    distillation_loss(student[:, :-1], sparse).backward()
    gradient, student.grad = student.grad, None
    distillation_loss(student[:, :-1].reshape(6, 50), teacher).backward()
    torch.testing.assert_close(student.grad, gradient, rtol=0, atol=0)
    assert (gradient[:, -1] == 0).all()


def test_upstream_gradients_retained_graphs_and_second_derivatives():
    student, teacher = pair()
    loss = distillation_loss(student, teacher)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    once = once.clone()
    (tripled,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(tripled, once * 3)
    torch.testing.assert_close(again, once)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(distillation_loss(student, teacher), student, create_graph=True)
    with torch.no_grad():
        assert not distillation_loss(student, teacher).requires_grad


def test_arguments_are_checked():
    student, teacher = pair()
    cases = [
        (dict(divergence="symmetric_kl"), ValueError, "symmetric_kl needs the teacher's logits"),
        (dict(tail="ghost"), ValueError, "tail must be one of bucket"),
        (dict(temperature=3.0), ValueError, r"temperature 3.0 was not captured: the teacher has 1.0, 2.5"),
        (dict(tail="sampled"), ValueError, "method='sample'"),
        (dict(vocab_size=41), ValueError, r"vocab_size must lie in 1\.\.40"),
        (dict(vocab_size=4.0), TypeError, "vocab_size must be an int"),
        (dict(ce_weight=1.0), ValueError, "ce_weight needs labels"),
        (dict(return_metrics=True), ValueError, "return_metrics needs the teacher's logits"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            distillation_loss(student, teacher, **options)
    containers = [
        (teacher[:2], ValueError, "positions of the student"),
        (edited(teacher, ids=teacher.ids.long()), TypeError, "teacher.ids must be int32"),
        (edited(teacher, logprobs=teacher.logprobs[:, :3]), ValueError, r"teacher.logprobs must have shape \[4, 6\]"),
        (edited(teacher, tail_logprob=teacher.tail_logprob[:, :1]), ValueError, "teacher.tail_logprob must have shape"),
        (edited(teacher, valid=teacher.valid.to("meta")), ValueError, "teacher.valid must be on the device"),
    ]
    for container, error, match in containers:
        with pytest.raises(error, match=match):
            distillation_loss(student, container)


def test_sampled_forms_that_do_not_exist_are_refused_with_the_reason():
    student, teacher = pair(tail="sampled")
    cases = [
        (dict(divergence="reverse_kl"), "reverse_kl has no unbiased form"),
        (dict(divergence="generalized_js"), "generalized_js has no unbiased form"),
        (dict(divergence="skew_reverse_kl", alpha=0.0), "skew_reverse_kl with alpha=0 has no unbiased form"),
        (dict(divergence="skew_kl", temperature=2.5), "needs temperature=1, got 2.5"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            distillation_loss(student, teacher, tail="sampled", **options)
    alpha = torch.tensor([0.1, 0.0, 0.1, 0.2])  # looking at a tensor would synchronise: its row becomes NaN
    value, _ = run(student, teacher, torch.ones(4), divergence="skew_reverse_kl", tail="sampled", alpha=alpha)
    assert value.isnan().tolist() == [False, True, False, False]


def test_direct_calls_are_checked():
    student, teacher = pair()
    options, rows = DivergenceOptions("skew_kl", alpha=0.1), rows_of(teacher)
    cases = [
        (rows._replace(ids=teacher.ids[:2]), "ids must have shape"),
        (rows._replace(ids=teacher.ids.long()), "ids must have dtype Int"),
        (rows._replace(logprobs=teacher.logprobs.double()), "logprobs must have dtype Float"),
        (rows._replace(log_norm=rows.log_norm[:3]), "log_norm must have shape"),
        (rows._replace(tail="sampled"), "needs counts"),
        (rows._replace(tail="x"), "tail must be bucket"),
        (rows._replace(vocab_size=0), "teacher_vocab must lie in"),
    ]
    for bad, match in cases:
        with pytest.raises(RuntimeError, match=match):
            sparse_divergence_op(student, bad, RowSides(), options)
    with pytest.raises(RuntimeError, match="has no CPU kernel"):
        sparse_divergence_op(student, rows, RowSides(), DivergenceOptions("x"))


def test_extra_memory_is_the_gradient_alone():
    student, teacher = pair(64, 20000, 64)
    distillation_loss(student, teacher).backward()
    student.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        distillation_loss(student, teacher).backward()
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated <= student.numel() * 4 + 2**20
