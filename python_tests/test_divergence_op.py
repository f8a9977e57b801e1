"""The operator as PyTorch sees it: registration, autograd rules, torch.compile, autocast, memory."""

import gc

import pytest
import torch
import torch._dynamo.testing
from divergence_cases import HELD, required
from tiers import full

from distillm_ext import TeacherHead, distillation_loss, linear_distillation_loss
from distillm_ext.functional import DIVERGENCES
from distillm_ext.ops.divergence import DivergenceOptions, RowSides
from distillm_ext.ops.divergence import divergence as divergence_op


def pair(rows=4, vocab=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(rows, vocab, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("need_gradient", (True, False))
def test_opcheck(dtype, need_gradient):
    student, teacher = pair(dtype=dtype)
    side = torch.float64 if dtype == torch.float64 else torch.float32
    labels, rows = torch.tensor([1, 2, -100, 3]), torch.rand(4, dtype=side)
    for options in ((None, None, None, None), (labels, rows, rows, rows)):
        loss = DivergenceOptions("skew_kl", 0.1, temperature=2.0, ce_weight=0.5 if options[0] is not None else 0.0)
        logits = student if need_gradient else student.detach()
        arguments = (logits, teacher, *options, *loss, 0, need_gradient, True)
        torch.library.opcheck(torch.ops.distillm_ext.divergence.default, arguments)


def test_opcheck_scale_rows():
    for dtype in (torch.float32, torch.bfloat16):
        gradient, scale = torch.randn(3, 5).to(dtype), torch.tensor([1.0, 2.0, 0.0])
        torch.library.opcheck(torch.ops.distillm_ext.scale_rows_.default, (gradient, scale))


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name not in HELD])
@pytest.mark.parametrize("temperature", (1.0, 1.7))
def test_gradcheck(divergence, temperature):
    student, teacher = pair(5, 9, torch.float64)
    labels = torch.tensor([1, 2, -100, 3, 8])

    def loss(x):
        options = dict(divergence=divergence, temperature=temperature, ce_weight=0.3, reduction="none")
        return distillation_loss(x, teacher, labels, **options)

    assert torch.autograd.gradcheck(loss, (student,))


# Those whose alpha is an option, required, or computed from the rows: the graph knows no other difference.
COMPILED = ("skew_kl", "interpolated", "token_adaptive")


@pytest.mark.parametrize("divergence", [*COMPILED, *full(*(name for name in DIVERGENCES if name not in COMPILED))])
@pytest.mark.parametrize("dynamic", [True, *full(False)])
@pytest.mark.parametrize("backend", ["aot_eager", *full("inductor")])
def test_compile_fullgraph(divergence, dynamic, backend):
    torch.compiler.reset()
    student, teacher = pair(6, 50)
    labels = torch.tensor([1, -100, 3, 4, 5, 6])

    def step(hidden, teacher, labels):
        logits = hidden * 2.0
        return distillation_loss(logits, teacher, labels, ce_weight=0.5, **required(dict(divergence=divergence)))

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


def test_compile_with_tensor_alpha_and_num_items():
    student, teacher = pair(6, 50)
    compiled = torch.compile(distillation_loss, fullgraph=True)
    options = dict(alpha=torch.rand(6), num_items=torch.tensor(9), weight=torch.rand(6))
    torch.testing.assert_close(compiled(student, teacher, **options), distillation_loss(student, teacher, **options))


@pytest.mark.parametrize("form", ["labels", "metrics", "heads", *full("logits", "none")])
def test_compiled_once_for_all_lengths(form):
    """Dynamic sizes: no new graph for every length of a batch."""
    torch.compiler.reset()
    head = torch.randn(37, 6, requires_grad=True)

    def step(student, teacher, labels):
        if form == "heads":
            hidden = student[..., :6]
            return linear_distillation_loss(hidden, head, TeacherHead(teacher[..., :6], head.detach()), labels)
        if form == "metrics":
            return distillation_loss(student, teacher, return_metrics=True)[0]
        return distillation_loss(
            student, teacher, labels if form == "labels" else None, reduction="none" if form == "none" else "mean"
        ).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for length in range(3, 16):
        student, teacher = torch.randn(2, length, 37, requires_grad=True), torch.randn(2, length, 37)
        labels = torch.randint(37, (2, length))
        loss = compiled(student, teacher, labels)
        torch.testing.assert_close(loss, step(student, teacher, labels))
        loss.backward()
    assert counter.frame_count <= 2


def test_autocast_and_half_logits():
    weight = torch.randn(30, 8, requires_grad=True)
    hidden, teacher = torch.randn(4, 8), torch.randn(4, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight.t()
        loss = distillation_loss(logits, teacher)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().sum() > 0


def test_only_the_student_gets_a_gradient():
    student, teacher = pair()
    teacher.requires_grad_()
    weight = torch.rand(4, requires_grad=True)
    distillation_loss(student, teacher, weight=weight).backward()
    assert teacher.grad is None and weight.grad is None and student.grad is not None
    frozen = student.detach()
    assert not distillation_loss(frozen, teacher).requires_grad
    with torch.no_grad():
        assert not distillation_loss(student, teacher).requires_grad


def test_retain_graph_and_non_unit_gradients():
    student, teacher = pair()
    loss = distillation_loss(student, teacher)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    once = once.clone()
    (tripled,) = torch.autograd.grad(loss, student, torch.tensor(3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(tripled, once * 3)
    torch.testing.assert_close(again, once)


def test_gradient_used_twice():
    """Two losses on one tensor, and the same loss twice in one graph."""
    student, teacher = pair()
    logits = student * 1.0
    distillation_loss(logits, teacher).backward()
    single, student.grad = student.grad, None
    logits = student * 1.0
    loss = distillation_loss(logits, teacher)
    (loss + 2 * loss + distillation_loss(logits, teacher)).backward()
    torch.testing.assert_close(student.grad, single * 4)
    student.grad = None
    for _ in range(2):
        distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, single * 2)


def test_unit_gradient_is_the_kernel_s_own_buffer():
    """No pass and no copy for loss.backward(): the saved buffer itself becomes the gradient."""
    student, teacher = pair(64, 4096)
    loss = distillation_loss(student, teacher, reduction="none")
    address = loss.grad_fn.next_functions[0][0].saved_tensors[0].data_ptr()
    loss.sum().backward()
    assert student.grad.data_ptr() == address


def test_second_derivative_is_refused():
    student, teacher = pair()
    loss = distillation_loss(student, teacher)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_direct_calls_are_checked():
    student, teacher = pair()
    options = DivergenceOptions("skew_kl", alpha=0.1)
    with pytest.raises(RuntimeError, match="teacher must have as many rows"):
        divergence_op(student, teacher[:2], RowSides(), options)
    with pytest.raises(RuntimeError, match="weight must have shape"):
        divergence_op(student, teacher, RowSides(weight=torch.ones(3)), options)
    with pytest.raises(RuntimeError, match="has no CPU kernel"):
        divergence_op(student, teacher, RowSides(), DivergenceOptions("x"))


def test_extra_memory_is_the_gradient_alone():
    student, teacher = pair(256, 20000)
    distillation_loss(student, teacher).backward()
    student.grad = None
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        distillation_loss(student, teacher).backward()
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    assert allocated <= student.numel() * 4 + 2**20
