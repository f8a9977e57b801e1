"""The stand-ins for TRL's loss, against its own code, and for DistiLLM's, against the published formulas."""

import pytest
import torch

from distillm_ext.compat import distillm
from distillm_ext.compat.trl import generalized_jsd_loss

V = 53


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 7, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.randint(V, (2, 7), generator=generator)
    labels[0, :3] = labels[1, 5] = -100
    return student.requires_grad_(), teacher, labels


def same_value_and_gradient(student, ours, theirs, offset=0.0):
    gradients = []
    for loss in (ours, theirs):
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        gradients.append(gradient)
    torch.testing.assert_close(ours + offset, theirs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("beta", (0.0, 0.1, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("reduction", ("batchmean", "sum", "mean"))
@pytest.mark.parametrize("masked", (True, False))
def test_trl(batch, beta, reduction, masked):
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    student, teacher, labels = batch
    options = dict(labels=labels if masked else None, beta=beta, temperature=1.5, reduction=reduction)
    same_value_and_gradient(
        student, generalized_jsd_loss(student, teacher, **options), theirs(student, teacher, **options)
    )
    options["num_items_in_batch"] = 5
    torch.testing.assert_close(generalized_jsd_loss(student, teacher, **options), theirs(student, teacher, **options))


def test_trl_without_valid_position(batch):
    student, teacher, labels = batch
    assert generalized_jsd_loss(student, teacher, torch.full_like(labels, -100)).item() == 0
    with pytest.raises(ValueError, match="reduction must be"):
        generalized_jsd_loss(student, teacher, reduction="median")


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_trl_sides_may_change_places(dtype):
    """beta = 1/2: the same number to the last digit, whatever the compiler contracts."""
    generator = torch.Generator().manual_seed(5)
    for vocab in (5, V, 1500):
        a, b = (torch.randn(40, 3, vocab, generator=generator).to(dtype) for _ in range(2))
        labels = torch.arange(120).view(40, 3)
        for row in range(0, 40, 1 if vocab == 5 else 8):
            sides = a[row : row + 1], b[row : row + 1]
            assert torch.equal(generalized_jsd_loss(*sides), generalized_jsd_loss(*sides[::-1]))
        assert torch.equal(generalized_jsd_loss(a, b, labels), generalized_jsd_loss(b, a, labels))


@pytest.mark.parametrize("beta", (0.0, 0.1, 0.5, 0.9, 1.0))
@pytest.mark.parametrize("masked", (True, False))
def test_trl_entry_by_entry(batch, beta, masked):
    """The summands, and their gradients under any upstream gradient; what num_items_in_batch divides is their sum."""
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    student, teacher, labels = batch
    options = dict(labels=labels if masked else None, beta=beta, temperature=1.5, reduction="none")
    ours, expected = generalized_jsd_loss(student, teacher, **options), theirs(student, teacher, **options)
    assert ours.shape == ((10, V) if masked else (2, 7, V))
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    same_value_and_gradient(student, (ours * upstream).sum(), (expected * upstream).sum())
    options["num_items_in_batch"] = 5
    divided = generalized_jsd_loss(student, teacher, **options)
    same_value_and_gradient(student, divided, theirs(student, teacher, **options))


@pytest.mark.parametrize("beta", (0.0, 0.5, 1.0))
def test_trl_entries_without_probability(batch, beta):
    """A vocabulary masked on both sides has entries 0 and gradients 0, where theirs is NaN; any dtype is float32."""
    student, teacher, labels = batch
    masked = torch.arange(V) >= 40
    leaf = student.detach().masked_fill(masked, -torch.inf).bfloat16().requires_grad_()
    entries = generalized_jsd_loss(
        leaf, teacher.masked_fill(masked, -torch.inf).float(), labels, beta, reduction="none"
    )
    (entries * torch.arange(V)).sum().backward()
    assert entries.dtype == torch.float32 and (entries[:, 40:] == 0).all() and (leaf.grad[..., 40:] == 0).all()
    whole = generalized_jsd_loss(leaf.float(), teacher.masked_fill(masked, -torch.inf).float(), labels, beta)
    torch.testing.assert_close(entries.sum() / 10, whole)


def test_trl_entries_are_checked(batch):
    student, teacher, labels = batch
    cases = [
        (dict(beta=1.5), ValueError, "beta must lie in"),
        (dict(temperature=0), ValueError, "temperature must be positive"),
        (dict(labels=labels[:1]), ValueError, "labels must have one entry per position"),
        (dict(teacher_logits=teacher[..., :9]), ValueError, "teacher_logits must have the shape of student_logits"),
        (dict(teacher_logits=None), TypeError, "teacher must be a tensor"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            generalized_jsd_loss(student, **{"teacher_logits": teacher, "reduction": "none", **options})


def test_distillm(batch):
    student, teacher, labels = batch
    p, q = teacher.softmax(-1), student.softmax(-1)
    mask = labels != -100

    def mean(rows):
        return rows[mask].mean()

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    model_batch, lam = {"label": labels}, 0.3
    expected = {
        distillm.forward_kl: mean(kl(p, q)),
        distillm.reverse_kl: mean(kl(q, p)),
        distillm.tv_distance: mean(0.5 * (p - q).abs().sum(-1)),
    }
    for loss, value in expected.items():
        same_value_and_gradient(student, loss(student, teacher, model_batch), value)
    mixed = (1 - lam) * p + lam * q
    expected = {
        distillm.symmetric_kl: mean((1 - lam) * kl(p, q) + lam * kl(q, p)),
        distillm.js_distance: mean((1 - lam) * kl(p, mixed) + lam * kl(q, mixed)),
        distillm.skewed_forward_kl: mean(kl(p, lam * p + (1 - lam) * q)),
        distillm.skewed_reverse_kl: mean(kl(q, mixed)),
    }
    for loss, value in expected.items():
        same_value_and_gradient(student, loss(student, teacher, model_batch, lam=lam), value)


def test_distillm_code_leaves_out_the_teacher_entropy(batch):
    """Its forward_kl is -sum p log q: ours plus the entropy of the teacher, with the same gradient."""
    student, teacher, labels = batch
    p, mask = teacher.softmax(-1), labels != -100
    theirs = -(p * student.log_softmax(-1)).sum(-1)[mask].mean()
    entropy = -(p * p.log()).sum(-1)[mask].mean()
    same_value_and_gradient(student, distillm.forward_kl(student, teacher, {"label": labels}), theirs, offset=entropy)
