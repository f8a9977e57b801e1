"""The CUDA kernels on a real device, against the float64 reference on the CPU. Run by `make gpu-check`."""

import pytest
import torch

from distillm_ext import DIVERGENCES, distillation_loss, reference

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
DTYPES = tuple(ROUNDING)
ALPHA = {"interpolated": 0.4}  # the one without a default


def pair(rows, vocab, dtype, teacher_vocab=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(rows, vocab, generator=generator) * 3).to(dtype)
    teacher = (torch.randn(rows, teacher_vocab or vocab, generator=generator) * 3).to(dtype)
    return student, teacher


def check(student, teacher, upstream=None, **options):
    upstream = torch.ones(len(student)) if upstream is None else upstream
    leaf = student.cuda().requires_grad_()
    loss = distillation_loss(leaf, teacher.cuda(), reduction="none", **options)
    loss.backward(upstream.cuda())
    expected_leaf = student.double().requires_grad_()
    expected = reference.per_token_divergence(expected_leaf, teacher.double(), **options)
    (expected * upstream.double()).sum().backward()
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=3e-5, atol=5e-6)
    gradient = expected_leaf.grad
    allowed = ROUNDING[student.dtype] * gradient.abs() + 1e-5 * gradient.abs().amax(-1, keepdim=True) + 3e-6
    assert ((leaf.grad.cpu().double() - gradient).abs() <= allowed).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 7, 1023, 32000, 50257, 128256, 151936))
def test_value_and_gradient(divergence, dtype, vocab):
    check(*pair(5, vocab, dtype), divergence=divergence, alpha=ALPHA.get(divergence), temperature=1.7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_non_unit_upstream_gradient(divergence):
    check(
        *pair(4, 5003, torch.bfloat16),
        torch.tensor([1.0, 0.5, -2.0, 1.0]),
        divergence=divergence,
        alpha=ALPHA.get(divergence),
    )


@pytest.mark.parametrize("vocabs", ((1500, 2300), (2300, 1500), (151936, 152064)))
def test_unequal_vocabularies(vocabs):
    check(*pair(3, vocabs[0], torch.bfloat16, vocabs[1]), divergence="skew_kl")


def test_layouts():
    student, teacher = pair(6, 1001, torch.bfloat16)
    expected = distillation_loss(student.cuda(), teacher.cuda(), reduction="none")
    wide = torch.cat([student, student], 1).cuda()[:, :1001]
    offset = torch.cat([torch.zeros(1, dtype=student.dtype), student.flatten()]).cuda()[1:].view(6, 1001)
    transposed = student.cuda().t().contiguous().t()
    for view in (wide, offset, transposed):
        torch.testing.assert_close(distillation_loss(view, teacher.cuda(), reduction="none"), expected)


def test_bad_rows_stay_alone():
    student, teacher = (x.float().cuda() for x in pair(6, 4001, torch.float32))
    clean = distillation_loss(student, teacher, reduction="none")
    student[1, 77], teacher[2, 4000], student[3] = torch.nan, torch.nan, -torch.inf
    labels = torch.tensor([1, 2, 3, 4, -100, 5], device="cuda")
    student[4] = torch.nan
    loss = distillation_loss(student, teacher, labels, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True, False, False]
    torch.testing.assert_close(loss[[0, 5]], clean[[0, 5]], rtol=0, atol=0)
    assert loss[4] == 0


def test_repeated_runs_agree_bit_for_bit():
    student, teacher = (x.cuda() for x in pair(64, 50257, torch.bfloat16))
    results = []
    for _ in range(3):
        leaf = student.detach().requires_grad_()
        loss = distillation_loss(leaf, teacher, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_more_than_two_to_the_31_elements():
    rows, vocab = 14200, 152064
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2 * 1.1:
        pytest.skip("needs 14 GB of device memory")
    student = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda").requires_grad_()
    teacher = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        student[-1, 5] = 8.0
    loss = distillation_loss(student, teacher, reduction="none")
    loss.sum().backward()
    assert loss[-1] > 0.1 and loss[:-1].abs().max() < 1e-6 and student.grad[-1].abs().max() > 1e-3


def test_compile_and_no_synchronisation():
    student, teacher = (x.cuda() for x in pair(8, 3001, torch.bfloat16))
    labels = torch.tensor([1, -100, 3, 4, 5, 6, 7, 8], device="cuda")
    student.requires_grad_()
    compiled = torch.compile(distillation_loss, fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, labels), distillation_loss(student, teacher, labels))
    torch.cuda.set_sync_debug_mode("error")
    try:
        distillation_loss(student, teacher, labels, ce_weight=0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad.isfinite().all()


def test_side_stream():
    student, teacher = (x.cuda() for x in pair(64, 50257, torch.bfloat16))
    expected = distillation_loss(student, teacher)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = distillation_loss(student, teacher)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(other, expected)


@pytest.mark.parametrize("inplace", (False, True))
def test_what_the_trainer_asks_for(inplace):
    """Metrics, vocab_size and logits[:, :-1] as on the CPU, in place too."""
    student, teacher = (x.view(2, 4, 1001) for x in pair(8, 1001, torch.bfloat16))
    results = []
    for device in ("cpu", "cuda"):
        leaf = student.to(device).requires_grad_()
        logits = (leaf * 1)[:, :-1]
        loss, metrics = distillation_loss(
            logits, teacher.to(device)[:, :-1], vocab_size=990, inplace=inplace, return_metrics=True
        )
        loss.backward()
        results.append([loss, leaf.grad, *vars(metrics).values()])
    for host, device in zip(*results, strict=True):
        torch.testing.assert_close(device.cpu().float(), host.float(), rtol=1e-2, atol=1e-5)
    assert (results[1][1][..., 990:] == 0).all() and (results[1][1][:, -1] == 0).all()
