"""`linear_distillation_loss` from compressed teachers: equal to the loss of materialised logits, chunk by chunk."""

import pytest
import torch
from linear_cases import Case, assert_same, close, value_and_gradients
from sparse_cases import FORMS, compressed, logits

from distillm_ext import distillation_loss, linear_distillation_loss
from distillm_ext.containers import LinearHead
from distillm_ext.ops.linear import chunks, operator
from distillm_ext.ops.linear.call import flatten

ROWS, VOCAB, HIDDEN = 9, 70, 12


class SparseCase(Case):
    def expected(self, **options):
        student = torch.nn.functional.linear(self.hidden, self.weight, self.bias) * self.scale
        if self.softcap:
            student = torch.tanh(student / self.softcap) * self.softcap
        return distillation_loss(student, self.teacher, self.labels, **options)


def make_case(dtype=torch.float64, tail="bucket", shape=(ROWS,), teacher_vocab=VOCAB, **transform) -> SparseCase:
    rows = torch.Size(shape).numel()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.arange(rows).view(shape) % VOCAB
    labels.view(-1)[::3] = -100
    return SparseCase(
        logits(rows, HIDDEN, dtype, 1, 1.0).view(*shape, HIDDEN).requires_grad_(),
        logits(VOCAB, HIDDEN, dtype, 2, 1.0).requires_grad_(), logits(1, VOCAB, dtype, 3)[0].requires_grad_(),
        compressed(logits(rows, teacher_vocab, wide, 4), 10, tail).reshape(*shape), labels, **transform,
    )  # fmt: skip


@pytest.mark.parametrize("divergence,tail", FORMS)
@pytest.mark.parametrize("chunk_rows", (2, None))
def test_equals_the_loss_of_logits(divergence, tail, chunk_rows):
    case = make_case(tail=tail)
    for temperature in (1.0,) if tail == "sampled" else (1.0, 2.5):
        options = dict(divergence=divergence, tail=tail, temperature=temperature, ce_weight=0.3)
        assert_same(case, chunk_rows=chunk_rows, **options)
    upstream = torch.rand(ROWS, dtype=torch.float64)
    assert_same(case, upstream, chunk_rows, divergence=divergence, tail=tail, reduction="none")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_softcap_scale_positions_and_side_inputs(dtype):
    for transform in ({}, dict(softcap=5.0, scale=0.5)):
        case = make_case(dtype, shape=(3, 3), **transform)
        sides = dict(weight=torch.rand(3, 3), cap=torch.rand(3, 3) + 1, alpha=torch.rand(3, 3), num_items=7)
        for chunk_rows in (2, 9):
            assert_same(case, chunk_rows=chunk_rows, divergence="skew_kl", **sides)


def test_vocabularies():
    assert_same(make_case(teacher_vocab=90), chunk_rows=4)
    assert_same(make_case(teacher_vocab=90), chunk_rows=4, divergence="forward_kl", vocab_size=VOCAB)
    assert_same(make_case(teacher_vocab=50), chunk_rows=4, vocab_size=40)
    with pytest.raises(ValueError, match="vocab_size=70"):
        make_case(teacher_vocab=90).ours(divergence="forward_kl")


def test_listed_rows_and_ignored_rows():
    case = make_case()
    rows = torch.tensor([1, 4, 7])
    value, gradients = value_and_gradients(case.ours(rows=rows, chunk_rows=2), case)
    labels = torch.full((ROWS,), -100).index_copy(0, rows, case.labels[rows])
    only = SparseCase(case.hidden, case.weight, case.bias, case.teacher, labels)
    expected, expected_gradients = value_and_gradients(only.expected(), only)
    close(value, expected, 1e-12)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        close(ours, theirs, 1e-12)
    with torch.no_grad():
        case.hidden[::3] = torch.nan  # ignored
    assert case.ours().isfinite()


def test_arguments_are_checked():
    case = make_case()
    cases = [
        (dict(temperature=3.0), "was not captured"),
        (dict(tail="sampled"), "method='sample'"),
        (dict(divergence="alpha_beta"), "needs the teacher's logits"),
        (dict(return_metrics=True), "return_metrics needs the teacher's logits"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            case.ours(**options)
    with pytest.raises(ValueError, match="positions of the student"):
        linear_distillation_loss(case.hidden, case.weight, case.teacher[:3], student_bias=case.bias)


def test_logits_exist_by_the_chunk():
    """Two rows of 40,000 logits at a time: no tensor of all of them, and no teacher logits at all."""
    rows, vocab = 16, 40000
    hidden, weight = logits(rows, 8, seed=1).requires_grad_(), logits(vocab, 8, seed=2)
    teacher = compressed(logits(rows, vocab, seed=3), 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_distillation_loss(hidden, weight, teacher, chunk_rows=2).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= 2 * 2 * vocab * 4 + 2**16


@pytest.mark.parametrize("tail", ("bucket", "sampled"))
def test_opcheck_and_compile(tail, monkeypatch):
    calls = []
    original = operator.linear_divergence
    monkeypatch.setattr("distillm_ext.linear.linear_divergence", lambda call: calls.append(call) or original(call))
    case = make_case(torch.float32, tail)
    case.ours(tail=tail, chunk_rows=4, ce_weight=0.5)
    case.ours(tail=tail, reduction="none")
    for call in calls:
        torch.library.opcheck(torch.ops.distillm_ext.linear_divergence.default, flatten(call))
    monkeypatch.undo()

    def step(hidden, weight, teacher, labels):
        return linear_distillation_loss(hidden * 2, weight, teacher, labels, tail=tail, chunk_rows=3)

    inputs = (case.hidden, case.weight, case.teacher, case.labels)
    expected = torch.autograd.grad(step(*inputs), case.weight)
    torch.compiler.reset()
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), case.weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tail", ("bucket", "sampled"))
def test_device_path_without_compaction(monkeypatch, tail):
    """What CUDA does, executed here: ignored rows stay in the products, and their NaN meets no gradient."""
    case = make_case(tail=tail)
    clean = value_and_gradients(case.ours(chunk_rows=2, tail=tail), case)
    with torch.no_grad():
        case.hidden[case.labels == -100] = torch.nan
    captured = []
    monkeypatch.setattr("distillm_ext.linear.linear_divergence", lambda call: captured.append(call) or (None,) * 3)
    case.ours(chunk_rows=2, tail=tail)
    with torch.no_grad():
        loss, _, _, *gradients = chunks.compute_cuda(captured[0])
    torch.testing.assert_close((loss, gradients), clean)


def test_a_linear_head_is_still_a_teacher():
    case = make_case(torch.float32)
    head = LinearHead(torch.randn(ROWS, 5), torch.randn(VOCAB, 5))
    teacher_logits = torch.nn.functional.linear(head.hidden, head.weight)
    ours = linear_distillation_loss(case.hidden, case.weight, head, case.labels)
    torch.testing.assert_close(ours, distillation_loss(case.hidden @ case.weight.t(), teacher_logits, case.labels))
