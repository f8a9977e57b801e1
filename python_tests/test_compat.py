"""The stand-ins for other projects' losses: TRL's own code, and the published formulas of Liger-Kernel and DistiLLM."""

import pytest
import torch
from torch.nn import functional as F

from distillm_ext.compat import distillm, liger
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
        generalized_jsd_loss(student, teacher, reduction="none")


def liger_jsd_formula(log_q, log_p, labels, beta):
    """beta KL(P || M) + (1 - beta) KL(Q || M); the ends are KL(P || Q) and KL(Q || P). Mean over labelled rows."""
    p, q = log_p.exp(), log_q.exp()
    if beta in (0.0, 1.0):
        rows = (p * (log_p - log_q) if beta == 0 else q * (log_q - log_p)).sum(-1)
    else:
        log_m = (beta * p + (1 - beta) * q).log()
        rows = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    return rows[labels != -100].mean()


@pytest.mark.parametrize("beta", (0.0, 0.3, 0.5, 1.0))
def test_liger_jsd(batch, beta):
    student, teacher, labels = batch
    log_q, log_p, labels = student.log_softmax(-1).view(-1, V), teacher.log_softmax(-1).view(-1, V), labels.view(-1)
    expected = liger_jsd_formula(log_q, log_p, labels, beta)
    same_value_and_gradient(student, liger.liger_jsd(log_q, log_p, labels, beta), expected)
    same_value_and_gradient(student, liger.LigerJSD(beta)(log_q, log_p, labels), expected)


@pytest.mark.parametrize("reduction", ("batchmean", "sum", "mean"))
@pytest.mark.parametrize("log_target", (False, True))
def test_liger_kl(batch, reduction, log_target):
    student, teacher, _ = batch
    log_q, log_p = student.log_softmax(-1).view(-1, V), teacher.log_softmax(-1).view(-1, V)
    target = log_p if log_target else log_p.exp()
    expected = F.kl_div(log_q, target, reduction=reduction, log_target=log_target)
    ours = liger.liger_kl_div(log_q, target, reduction=reduction, log_target=log_target)
    same_value_and_gradient(student, ours, expected)
    module = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)
    same_value_and_gradient(student, module(log_q, target), expected)


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
