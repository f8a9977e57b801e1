"""`linear_distillation_loss` against `distillation_loss` on materialised logits: numbers, rows that do not count."""

from dataclasses import replace

import pytest
import torch
from linear_cases import HIDDEN, ROWS, VOCAB, assert_same, logits_of, make_case, value_and_gradients

from distillm_ext import linear_distillation_loss
from distillm_ext.functional import DIVERGENCES
from distillm_ext.ops.linear import chunks, gradients

# ---- numbers


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_equals_the_materialised_form(divergence, dtype, chunk_rows):
    # In bfloat16 the forms differ by one rounding of each logit: small logits keep that below the tolerance.
    case = make_case(dtype, scale=0.25)
    alpha = 0.4 if divergence == "interpolated" else None
    assert_same(case, chunk_rows=chunk_rows, divergence=divergence, alpha=alpha, temperature=1.5, ce_weight=0.25)


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
    monkeypatch.setattr(gradients, "_TILE", tile)
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
    seen, project = [], chunks.project

    def spy(head, out):
        seen.append(len(head.hidden))
        return project(head, out)

    monkeypatch.setattr(chunks, "project", spy)
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
    whole = chunks.compute_cuda
    captured = []
    monkeypatch.setattr("distillm_ext.linear.linear_divergence", lambda call: captured.append(call) or (None,) * 3)
    case.ours(chunk_rows=2)
    with torch.no_grad():
        loss, _, _, *gradients = whole(captured[0])
    torch.testing.assert_close((loss, gradients), clean)


def test_device_accumulation_is_that_of_the_host(monkeypatch):
    """`torch.mm` to float32 exists on CUDA alone; its meaning is put in its place."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    gradient, hidden = torch.randn(5, 9).bfloat16(), torch.randn(5, 4).bfloat16()
    found, expected = torch.full((9, 4), torch.nan), torch.full((9, 4), torch.nan)
    for first in (True, False):
        gradients.accumulate_cuda(found, gradient, hidden, 0.5, first)
        gradients.accumulate_cpu(expected, gradient, hidden, 0.5, first)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, gradient.float().t() @ hidden.float())
