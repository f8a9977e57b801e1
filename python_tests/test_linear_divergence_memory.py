"""Chunks and peak memory of the fused loss; metrics; what is computed beside it; bad arguments."""

from dataclasses import replace

import pytest
import torch
from linear_cases import HIDDEN, ROWS, VOCAB, close, logits_of, make_case

from distillm_ext import LinearDistillationLoss, TeacherHead, linear_distillation_loss
from distillm_ext.checks.sides import LossRequest
from distillm_ext.containers import LinearHead
from distillm_ext.linear import linear_cross_entropy_loss, linear_loss
from distillm_ext.ops.divergence import DivergenceOptions
from distillm_ext.ops.linear import chunks

# ---- memory and chunks


@pytest.mark.parametrize(("chunk_rows", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (4, [4, 3]), (7, [7]), (100, [7])])
def test_chunks_are_even_and_bounded(monkeypatch, chunk_rows, sizes):
    seen, project = [], chunks.project

    def spy(head, out):
        seen.append(tuple(out.shape))
        return project(head, out)

    monkeypatch.setattr(chunks, "project", spy)
    make_case(labels=False).ours(chunk_rows=chunk_rows)
    assert seen[::2] == seen[1::2] == [(size, VOCAB) for size in sizes]


@pytest.mark.parametrize(("gradient", "sizes"), [(True, [15, 15]), (False, [15, 15])])
def test_automatic_chunks_keep_to_the_budget(monkeypatch, gradient, sizes):
    # Both sides' logits, 4 bytes an entry; the gradient takes the place of the student's.
    monkeypatch.setattr(chunks, "MEMORY_BUDGET", 26 * VOCAB * 4 * 2)
    case = make_case(shape=(30,), labels=False)
    seen, project = [], chunks.project
    monkeypatch.setattr(chunks, "project", lambda head, out: seen.append(len(out)) or project(head, out))
    with torch.set_grad_enabled(gradient):
        case.ours()
    assert seen[::2] == sizes


def test_automatic_chunks_are_never_tiny(monkeypatch):
    monkeypatch.setattr(chunks, "MEMORY_BUDGET", 1)
    seen, project = [], chunks.project
    monkeypatch.setattr(chunks, "project", lambda head, out: seen.append(len(out)) or project(head, out))
    make_case(shape=(32,), labels=False).ours()
    assert seen[::2] == [16, 16]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_peak_memory_is_that_of_chunks(softcap):
    rows, vocab, size = 64, 4096, 4
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, teacher = (
        torch.randn(vocab, 8, requires_grad=True),
        TeacherHead(torch.randn(rows, 8), torch.randn(vocab, 8)),
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_distillation_loss(hidden, weight, teacher, chunk_rows=size, logit_softcap=softcap).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    gradients, chunk = 4 * 8 * (vocab + rows), 4 * size * vocab
    # Logits of both sides (a soft-cap keeps an eighth of one), plus vectors of rows and the factors of the upstream
    # gradient [V].
    assert peak <= gradients + (2 if softcap is None else 2.25) * chunk + 4 * vocab + 20_000


# ---- beside the loss


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_metrics_are_those_of_the_materialised_form(softcap, gradients, reduction):
    case = make_case(torch.float64, shape=(2, 5), softcap=softcap)
    options = dict(temperature=1.3, reduction=reduction, return_metrics=True)
    with torch.set_grad_enabled(gradients):
        found, expected = case.ours(chunk_rows=3, **options), case.expected(**options)
    torch.testing.assert_close(found[0], expected[0])
    for name in ("teacher_entropy", "student_entropy", "top1_agreement"):
        value = getattr(found[1], name)
        assert value.shape == (2, 5) and not value.requires_grad and (value[case.labels == -100] == 0).all()
        torch.testing.assert_close(value, getattr(expected[1], name))
    if gradients:
        torch.testing.assert_close(
            *(torch.autograd.grad(x[0].sum(), case.leaves(), retain_graph=True) for x in (found, expected))
        )


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
    options = DivergenceOptions("skew_kl", alpha=0.1)
    loss, part, _ = linear_loss(
        student, case.teacher, options._replace(ce_weight=0.3), LossRequest(case.labels, num_items=5), need_ce=True
    )
    torch.testing.assert_close(part, alone.detach())
    torch.testing.assert_close(loss, case.expected(divergence="skew_kl", ce_weight=0.3, num_items=5))
    assert not part.requires_grad
    request = LossRequest(case.labels, reduction="none")
    rows, parts, _ = linear_loss(student, case.teacher, options, request, need_ce=True)
    torch.testing.assert_close(rows, case.expected(divergence="skew_kl", reduction="none"))
    torch.testing.assert_close(parts, torch.nn.functional.cross_entropy(logits, case.labels, reduction="none"))
    assert (linear_loss(student, case.teacher, options, request).ce == 0).all()


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
    "teacher type": (dict(teacher="x"), TypeError, "CompressedLogits or a tensor of logits, got str"),
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
