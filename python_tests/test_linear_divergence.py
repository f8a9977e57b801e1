"""`linear_distillation_loss` against `distillation_loss` on materialised logits: values, gradients, chunks, PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distillm_ext import LinearDistillationLoss, TeacherHead, distillation_loss, linear_distillation_loss
from distillm_ext.containers import LinearHead
from distillm_ext.functional import DIVERGENCES
from distillm_ext.linear import linear_cross_entropy_loss, linear_distillation_parts
from distillm_ext.ops import linear_chunks
from distillm_ext.ops.linear_divergence import linear_divergence

ROWS, VOCAB, HIDDEN = 7, 33, 12
# Largest relative error of a gradient, by the rounding of what is summed up.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """Both sides of one loss; `transform` is what stands behind the student's head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: TeacherHead | Tensor
    labels: Tensor | None
    softcap: float | None = None
    scale: float = 1.0

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def ours(self, **options: Any) -> Tensor:
        return linear_distillation_loss(
            self.hidden, self.weight, self.teacher, self.labels, student_bias=self.bias, logit_softcap=self.softcap,
            logit_scale=self.scale, **options,
        )  # fmt: skip

    def expected(self, **options: Any) -> Tensor:
        student = LinearHead(self.hidden, self.weight, self.bias, self.softcap, self.scale)
        teacher = self.teacher if isinstance(self.teacher, Tensor) else logits_of(self.teacher)
        return distillation_loss(logits_of(student), teacher, self.labels, **options)


def logits_of(head: LinearHead) -> Tensor:
    """As a model forms them: head, scale, softcap."""
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap


def make_case(
    dtype: torch.dtype = torch.float32, *, shape: tuple[int, ...] = (ROWS,), bias: bool = True, vocab: int = VOCAB,
    teacher_vocab: int = VOCAB, labels: bool = True, seed: int = 0, **transform: Any,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(min(vocab, teacher_vocab), shape, generator=generator)
    target.view(-1)[::3] = -100
    return Case(
        random(*shape, HIDDEN).requires_grad_(), random(vocab, HIDDEN).requires_grad_(),
        random(vocab).requires_grad_() if bias else None,
        TeacherHead(random(*shape, 20), random(teacher_vocab, 20), random(teacher_vocab) if bias else None),
        target if labels else None, **transform,
    )  # fmt: skip


def value_and_gradients(loss: Tensor, case: Case, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    return loss.detach(), list(torch.autograd.grad(loss, case.leaves(), upstream))


def assert_same(case: Case, upstream: Tensor | None = None, chunk_rows: int | None = None, **options: Any) -> None:
    value, gradients = value_and_gradients(case.ours(chunk_rows=chunk_rows, **options), case, upstream)
    expected, expected_gradients = value_and_gradients(case.expected(**options), case, upstream)
    dtype = case.hidden.dtype
    assert value.dtype == expected.dtype
    close(value, expected, TOLERANCE[dtype])
    for gradient, wanted, leaf in zip(gradients, expected_gradients, case.leaves(), strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape and wanted.abs().max() > 0
        close(gradient, wanted, TOLERANCE[dtype])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = expected.abs().max().item() if expected.numel() else 0.0
    # A gradient is a difference of probabilities: their rounding stays where they cancel.
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * (largest + 0.05))


# ---- numbers


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_equals_the_materialised_form(divergence, dtype, chunk_rows):
    # In bfloat16 the forms differ by one rounding of each logit: small logits keep that below the tolerance.
    case = make_case(dtype, scale=0.25)
    assert_same(case, chunk_rows=chunk_rows, divergence=divergence, temperature=1.5, ce_weight=0.25)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_transforms_of_both_sides(bias, softcap, scale, dtype):
    case = make_case(dtype, bias=bias, softcap=softcap, scale=scale)
    case.teacher = replace(case.teacher, softcap=softcap and 3.0, scale=2 * scale)
    assert_same(case, chunk_rows=2, divergence="generalized_js")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_weights_and_leading_dimensions(reduction):
    case = make_case(torch.float64, shape=(2, 3, 2))
    generator = torch.Generator().manual_seed(9)
    weight, alpha, cap = (torch.rand(2, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    weight[0, 1, 1] = 0.0
    upstream = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64) if reduction == "none" else None
    for size in (1, 5, None):
        assert_same(case, upstream, size, reduction=reduction, weight=weight, alpha=alpha, cap=cap * 3, ce_weight=0.5)


@pytest.mark.parametrize("num_items", [11, torch.tensor(11)])
def test_num_items_and_ignore_index(num_items):
    case = make_case()
    case.labels[case.labels == -100] = -1
    assert_same(case, chunk_rows=2, num_items=num_items, ignore_index=-1)


def test_without_labels_every_row_counts():
    assert_same(make_case(labels=False), chunk_rows=3)
    case = make_case(labels=False)
    assert_same(case, chunk_rows=3, weight=torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, -0.5, 0.0]))


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_plain_teacher_logits(teacher_dtype):
    case = make_case()
    case.teacher = logits_of(case.teacher).to(teacher_dtype)
    assert_same(case, chunk_rows=3)
    assert_same(case, torch.rand(ROWS), 3, reduction="none")


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(33, 40), (40, 33)])
@pytest.mark.parametrize("vocab_size", [None, 33, 21])
def test_unequal_vocabularies(vocab, teacher_vocab, vocab_size):
    case = make_case(torch.float64, vocab=vocab, teacher_vocab=teacher_vocab)
    case.labels.clamp_(max=20)
    for size in (2, None):
        assert_same(case, None, size, vocab_size=vocab_size, ce_weight=0.5)
    case.teacher = logits_of(case.teacher)
    assert_same(case, chunk_rows=2, vocab_size=vocab_size)


def test_detached_mixture_reaches_the_kernel():
    case = make_case(torch.float64)
    assert_same(case, divergence="skew_reverse_kl", alpha=0.3, detach_mixture=True)
    attached, detached = (case.ours(divergence="skew_reverse_kl", alpha=0.3, detach_mixture=d) for d in (False, True))
    assert not torch.equal(*(torch.autograd.grad(loss, case.hidden)[0] for loss in (attached, detached)))


def test_teacher_of_another_dtype_is_projected_in_its_own():
    case = make_case(bias=False)
    teacher = case.teacher
    case.teacher = replace(teacher, weight=teacher.weight.bfloat16())
    expected = replace(case, teacher=teacher.hidden.bfloat16() @ teacher.weight.bfloat16().t()).expected()
    torch.testing.assert_close(case.ours(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("tile", [1, 10, 4096])
def test_bf16_weight_gradient_accumulates_in_float32(monkeypatch, tile):
    """Chunk sums beyond bfloat16's eight bits: rounding after each chunk would lose them."""
    monkeypatch.setattr(linear_chunks, "_TILE", tile)
    rows = 256
    hidden = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
    weight = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(VOCAB, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)).expand(rows, VOCAB)
    options = dict(divergence="forward_kl", reduction="sum")
    linear_distillation_loss(hidden, weight, teacher, chunk_rows=1, student_bias=bias, **options).backward()
    one = (torch.full((VOCAB,), 1 / VOCAB) - teacher[0].softmax(-1)).bfloat16().float()
    torch.testing.assert_close(weight.grad.float(), (rows * one).bfloat16().float().expand(HIDDEN, -1).t())
    torch.testing.assert_close(bias.grad.float(), (rows * one).bfloat16().float())


# ---- rows that do not count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_may_hold_nan(dtype):
    case = make_case(dtype)
    clean = value_and_gradients(case.ours(chunk_rows=2), case)
    with torch.no_grad():
        case.hidden[case.labels == -100] = torch.nan
        case.teacher.hidden[case.labels == -100] = torch.nan
    found = value_and_gradients(case.ours(chunk_rows=2), case)
    torch.testing.assert_close(found, clean, rtol=0, atol=0)
    assert (found[1][0][case.labels == -100] == 0).all()


def test_ignored_rows_meet_no_head(monkeypatch):
    seen, project = [], linear_chunks.project

    def spy(hidden, *rest):
        seen.append(len(hidden))
        return project(hidden, *rest)

    monkeypatch.setattr(linear_chunks, "project", spy)
    case = make_case()
    case.ours(chunk_rows=100)
    assert seen == [4, 4]  # student, teacher; three of seven labels are ignored


def test_nan_row_leaves_other_rows_clean():
    case = make_case(labels=False)
    clean = value_and_gradients(case.ours(reduction="sum", chunk_rows=3), case)
    with torch.no_grad():
        case.hidden[2] = torch.nan
    value, (hidden, weight, bias) = value_and_gradients(case.ours(reduction="sum", chunk_rows=3), case)
    others = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(hidden[others], clean[1][0][others])
    assert value.isnan() and hidden[2].isnan().all() and weight.isnan().all() and bias.isnan().all()
    rows = case.ours(reduction="none", chunk_rows=3)
    assert rows.isnan().tolist() == [False, False, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_valid_row_and_no_row(dtype, reduction):
    for shape in ((4,), (0,), (2, 0)):
        case = make_case(dtype, shape=shape)
        case.labels.fill_(-100)
        loss = case.ours(reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ()) and (loss == 0).all()
        gradients = torch.autograd.grad(loss.sum(), case.leaves())
        assert all((g == 0).all() and g.shape == x.shape for g, x in zip(gradients, case.leaves(), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_index(reduction):
    """Listed positions alone count, in the mean's divisor too; labels still apply among them."""
    case = make_case(torch.float64, shape=(2, 5))
    rows = torch.tensor([9, 1, 3, 4])
    masked = replace(case, labels=torch.full_like(case.labels, -100))
    masked.labels.view(-1)[rows] = case.labels.view(-1)[rows]
    assert (masked.labels.view(-1)[rows] == -100).any()
    upstream = torch.rand(2, 5, dtype=torch.float64) if reduction == "none" else None
    expected = value_and_gradients(masked.expected(reduction=reduction), case, upstream)
    for size in (3, None):
        found = value_and_gradients(case.ours(reduction=reduction, rows=rows, chunk_rows=size), case, upstream)
        torch.testing.assert_close(found, expected)
    unlabelled = replace(case, labels=None)
    listed = torch.zeros(10, dtype=torch.float64).index_fill(0, rows, 1.0).view(2, 5)
    torch.testing.assert_close(unlabelled.ours(rows=rows), unlabelled.expected(weight=listed))
    weight = torch.rand(2, 5, dtype=torch.float64) + 0.5
    torch.testing.assert_close(unlabelled.ours(rows=rows, weight=weight), unlabelled.expected(weight=listed * weight))


def test_listed_rows_that_are_ignored_may_hold_nan():
    case, rows = make_case(), torch.tensor([0, 1, 3, 4])
    clean = value_and_gradients(case.ours(rows=rows), case)
    with torch.no_grad():
        case.hidden[[0, 2, 3]] = torch.nan  # ignored, not listed, ignored
    torch.testing.assert_close(value_and_gradients(case.ours(rows=rows), case), clean)


def test_device_path_without_compaction(monkeypatch):
    """What CUDA does, executed here: ignored rows stay in the products, and their NaN meets no gradient."""
    case = make_case()
    clean = value_and_gradients(case.ours(chunk_rows=2), case)
    with torch.no_grad():
        case.hidden[case.labels == -100] = torch.nan
    whole = linear_chunks.linear_divergence_cuda
    captured = []
    monkeypatch.setattr("distillm_ext.linear.linear_divergence", lambda call: captured.append(call) or (None, None))
    case.ours(chunk_rows=2)
    with torch.no_grad():
        loss, _, *gradients = whole(*captured[0])
    torch.testing.assert_close((loss, gradients), clean)


def test_device_accumulation_is_that_of_the_host(monkeypatch):
    """`torch.mm` to float32 exists on CUDA alone; its meaning is put in its place."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    gradient, hidden = torch.randn(5, 9).bfloat16(), torch.randn(5, 4).bfloat16()
    found, expected = torch.full((9, 4), torch.nan), torch.full((9, 4), torch.nan)
    for first in (True, False):
        linear_chunks._accumulate_cuda(found, gradient, hidden, 0.5, first)
        linear_chunks._accumulate_cpu(expected, gradient, hidden, 0.5, first)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, gradient.float().t() @ hidden.float())


# ---- memory and chunks


@pytest.mark.parametrize(("chunk_rows", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (4, [4, 3]), (7, [7]), (100, [7])])
def test_chunks_are_even_and_bounded(monkeypatch, chunk_rows, sizes):
    seen, project = [], linear_chunks.project

    def spy(hidden, weight, bias, scale, softcap, out):
        seen.append(tuple(out.shape))
        return project(hidden, weight, bias, scale, softcap, out)

    monkeypatch.setattr(linear_chunks, "project", spy)
    make_case(labels=False).ours(chunk_rows=chunk_rows)
    assert seen[::2] == seen[1::2] == [(size, VOCAB) for size in sizes]


@pytest.mark.parametrize(("gradient", "sizes"), [(True, [15, 15]), (False, [30])])
def test_automatic_chunks_keep_to_the_budget(monkeypatch, gradient, sizes):
    # Both sides' logits and, where it is formed, the gradient: 4 bytes an entry.
    monkeypatch.setattr(linear_chunks, "MEMORY_BUDGET", 26 * VOCAB * 4 * 3)
    case = make_case(shape=(30,), labels=False)
    seen, project = [], linear_chunks.project
    monkeypatch.setattr(linear_chunks, "project", lambda *a: seen.append(len(a[0])) or project(*a))
    with torch.set_grad_enabled(gradient):
        case.ours()
    assert seen[::2] == sizes


def test_automatic_chunks_are_never_tiny(monkeypatch):
    monkeypatch.setattr(linear_chunks, "MEMORY_BUDGET", 1)
    seen, project = [], linear_chunks.project
    monkeypatch.setattr(linear_chunks, "project", lambda *a: seen.append(len(a[0])) or project(*a))
    make_case(shape=(32,), labels=False).ours()
    assert seen[::2] == [16, 16]


def test_peak_memory_is_that_of_chunks():
    rows, vocab, size = 64, 4096, 4
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, teacher = (
        torch.randn(vocab, 8, requires_grad=True),
        TeacherHead(torch.randn(rows, 8), torch.randn(vocab, 8)),
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_distillation_loss(hidden, weight, teacher, chunk_rows=size).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    gradients, chunk = 4 * 8 * (vocab + rows), 4 * size * vocab
    # Logits of both sides and one gradient, plus vectors of rows and the factors of the upstream gradient [V].
    assert peak <= gradients + 3 * chunk + 4 * vocab + 20_000


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


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name not in ("token_adaptive", "adaptive_kl")])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(divergence, softcap):
    if divergence == "interpolated":
        pytest.skip("its target follows the student but is held constant, which finite differences do not see")
    case = make_case(torch.float64, vocab=9, teacher_vocab=9, shape=(4,))
    options = dict(divergence=divergence, ce_weight=0.3, chunk_rows=2, reduction="none")

    def loss(hidden, weight, bias):
        moved = replace(case, hidden=hidden, weight=weight, bias=bias, softcap=softcap, scale=0.7)
        return moved.ours(**options)

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))
    options["reduction"] = "mean"
    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


# ---- as PyTorch sees it


def captured_call(case: Case, monkeypatch, **options: Any):
    calls, answer = [], (torch.zeros(ROWS),) * 2
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
    torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, tuple(call))


def test_opcheck_per_row_and_inference(monkeypatch):
    case = make_case()
    call = captured_call(case, monkeypatch, reduction="none")._replace(row_weight=torch.rand(ROWS))
    torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, tuple(call))
    with torch.no_grad():
        call = captured_call(case, monkeypatch)
    frozen = call._replace(hidden=call.hidden.detach(), weight=call.weight.detach(), bias=None, need_ce=True)
    torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, tuple(frozen))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(reduction, dynamic):
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
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
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


# ---- beside the loss


def test_parts_and_cross_entropy_alone():
    case = make_case(softcap=3.0)
    student = LinearHead(case.hidden, case.weight, case.bias, 3.0)
    logits = logits_of(student)
    ce = torch.nn.functional.cross_entropy(logits, case.labels, reduction="sum") / 5
    expected = torch.autograd.grad(ce, case.leaves())
    alone = linear_cross_entropy_loss(student, case.labels, num_items=5)
    torch.testing.assert_close(alone, torch.nn.functional.cross_entropy(logits, case.labels, reduction="sum") / 5)
    for found, wanted in zip(torch.autograd.grad(alone, case.leaves()), expected, strict=True):
        close(found, wanted, 1e-5)
    loss, part = linear_distillation_parts(
        student, case.teacher, case.labels, divergence="skew_kl", ce_weight=0.3, num_items=5
    )
    torch.testing.assert_close(part, alone.detach())
    torch.testing.assert_close(loss, case.expected(divergence="skew_kl", ce_weight=0.3, num_items=5))
    assert not part.requires_grad
    options = dict(divergence="skew_kl", reduction="none")
    rows, parts = linear_distillation_parts(student, case.teacher, case.labels, **options)
    torch.testing.assert_close(rows, case.expected(**options))
    torch.testing.assert_close(parts, torch.nn.functional.cross_entropy(logits, case.labels, reduction="none"))
    assert (linear_distillation_parts(student, case.teacher, case.labels, **options, need_ce=False)[1] == 0).all()


def test_module_passes_everything_on():
    case = make_case(softcap=3.0, scale=0.5)
    options = dict(divergence="generalized_js", beta=0.3, temperature=2.0, ce_weight=0.2, cap=1.0)
    module = LinearDistillationLoss(logit_softcap=3.0, logit_scale=0.5, chunk_rows=2, **options)
    rows, weight = torch.tensor([1, 2, 4]), torch.rand(ROWS)
    sides = (case.hidden, case.weight, case.teacher, case.labels)
    found = module(*sides, student_bias=case.bias, weight=weight, rows=rows, num_items=3)
    assert torch.equal(found, case.ours(weight=weight, rows=rows, num_items=3, chunk_rows=2, **options))
    assert "logit_softcap=3.0" in repr(module)


# ---- bad input

BAD = {
    "weight shape": (dict(weight=torch.zeros(VOCAB, 5)), ValueError, r"student_weight must have shape \[V, 12\]"),
    "weight type": (dict(weight=3), TypeError, "student_weight must be a tensor, got int"),
    "weight dtype": (dict(weight=torch.zeros(VOCAB, HIDDEN, dtype=torch.int64)), TypeError, "student_weight must be f"),
    "mixed dtypes": (dict(weight=torch.zeros(VOCAB, HIDDEN).bfloat16()), TypeError, "outside of autocast"),
    "bias shape": (dict(bias=torch.zeros(3)), ValueError, r"student_bias must have shape \[33\], got \[3\]"),
    "hidden": (dict(hidden=torch.zeros(7, 0)), ValueError, "student_hidden must have shape"),
    "device": (dict(weight=torch.zeros(VOCAB, HIDDEN, device="meta")), ValueError, "student_weight must be on the dev"),
    "softcap": (dict(softcap=0.0), ValueError, "logit_softcap must be positive and finite, got 0.0"),
    "scale": (dict(scale="x"), TypeError, "logit_scale must be a number, got str"),
    "teacher type": (dict(teacher="x"), TypeError, "teacher must be a TeacherHead or a tensor of logits, got str"),
    "teacher logits": (dict(teacher=torch.zeros(3, VOCAB)), ValueError, "teacher must have the positions"),
    "teacher empty": (dict(teacher=torch.zeros(7, 0)), ValueError, "teacher must have shape"),
    "teacher float64": (dict(teacher=torch.zeros(7, VOCAB).double()), TypeError, "float64 needs float64 on both"),
    "teacher positions": (dict(teacher=TeacherHead(torch.zeros(3, 5), torch.zeros(VOCAB, 5))), ValueError,
                          "teacher.hidden must have the positions"),
    "teacher weight": (dict(teacher=TeacherHead(torch.zeros(7, 5), torch.zeros(VOCAB, 6))), ValueError,
                       "teacher.weight must have shape"),
    "teacher softcap": (dict(teacher=TeacherHead(torch.zeros(7, 5), torch.zeros(VOCAB, 5), softcap=-1.0)), ValueError,
                        "teacher.softcap must be positive"),
    "labels": (dict(labels=torch.zeros(3, dtype=torch.long)), ValueError, "labels must have one entry per position"),
}  # fmt: skip
BAD_OPTIONS = {
    "chunk_rows": (dict(chunk_rows=0), ValueError, "chunk_rows must be at least 1, got 0"),
    "chunk_rows type": (dict(chunk_rows=2.0), TypeError, "chunk_rows must be an int or None, got float"),
    "rows dtype": (dict(rows=torch.tensor([1.0])), TypeError, "rows must be an int64 tensor .*got torch.float32"),
    "rows shape": (dict(rows=torch.tensor([[1]])), ValueError, r"rows must have shape \[n\]"),
    "vocab_size": (dict(vocab_size=34), ValueError, r"vocab_size must lie in 1..33"),
    "vocab_size type": (dict(vocab_size=True), TypeError, "vocab_size must be an int"),
    "divergence": (dict(divergence="x"), ValueError, "divergence must be one of"),
    "reduction": (dict(reduction="x"), ValueError, "reduction must be"),
    "weight device": (
        dict(weight=torch.ones(7, device="meta")),
        ValueError,
        "weight must be on the device of",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sides(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        replace(make_case(), **changes).ours()


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name):
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        make_case().ours(**options)


def test_ce_needs_labels_and_infinite_divergences_advise():
    with pytest.raises(ValueError, match="ce_weight needs labels"):
        make_case(labels=False).ours(ce_weight=0.5)
    with pytest.raises(ValueError, match="vocab_size=33"):
        make_case(teacher_vocab=40).ours(divergence="forward_kl")
