"""Operator `topk_logits`, method "topk", on the CPU against the float64 reference; and as PyTorch sees it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import full

from distillm_ext import compress_logits
from distillm_ext.ops.topk_logits import topk_logits
from distillm_ext.reference.compression import compress_logits_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rows(count, vocab, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, vocab, generator=generator) * spread).to(dtype)


def check(logits, k, atol=2e-6, **options):
    """Ids exactly, numbers to rounding. The reference sorts all of the row and sums in float64."""
    found = compress_logits(logits, k, **options)
    expected = compress_logits_reference(logits.double(), k, **options)
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.ids, expected.ids)
    for name in ("logprobs", "log_norm", "tail_logprob", "label_logprob"):
        got, wanted = getattr(found, name), getattr(expected, name)
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got.double(), wanted, rtol=3e-7, atol=atol, equal_nan=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 2, 7, 31, 33, 1023, 1025, 5003))
@pytest.mark.parametrize("k", (1, 2, 63, 64, 1024))
def test_against_reference(dtype, vocab, k):
    labels = torch.tensor([0, vocab - 1, -100, vocab])
    check(rows(4, vocab, dtype), k, labels=labels, temperatures=(1.0, 2.0, 0.5))


@pytest.mark.parametrize("vocab", (50257, 152064, 262144))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_large_vocabularies(vocab, dtype):
    for k in (64, 1024):
        check(rows(2, vocab, dtype), k)


@pytest.mark.parametrize("vocab", (1500, 6000))
def test_all_entries_kept(vocab):
    found = check(rows(2, vocab), vocab, temperatures=(1.0, 3.0))
    assert (found.tail_logprob == -torch.inf).all()
    assert (found.ids.sort(-1).values == torch.arange(vocab)).all()


@pytest.mark.parametrize("order", ("ascending", "descending", "constant", "few values", "two peaks"))
def test_adversarial_orders(order):
    """The running threshold rises with every entry, or with none, or meets ties all along."""
    base = torch.linspace(-20, 20, 20011)
    logits = {
        "ascending": base,
        "descending": base.flip(0),
        "constant": torch.full((20011,), 1.5),
        "few values": (torch.arange(20011) % 7).float(),
        "two peaks": torch.cat([base.flip(0)[:10000], base[10000:]]),
    }[order]
    for k in (1, 64, 300):
        check(logits[None], k)


@pytest.mark.parametrize("k", (1, 2))
def test_a_tile_of_new_maxima_after_a_few(k):
    """The most that is gathered between two cuts, while k is small."""
    logits = torch.full((1, 3072), -5.0)
    logits[0, 1024:1119] = torch.linspace(0, 1, 95)
    logits[0, 2048:] = torch.linspace(2, 3, 1024)
    check(logits, k)


def test_ties_go_to_lower_ids():
    logits = torch.zeros(1, 9000)
    logits[0, [8999, 17, 4000]] = 1.0
    assert check(logits, 5).ids.tolist() == [[17, 4000, 8999, 0, 1]]
    signed = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert check(signed, 4).ids.tolist() == [[0, 1, 2, 3]]


def test_masked_columns_are_never_kept():
    logits = rows(3, 5000)
    logits[0, ::2] = -torch.inf
    logits[1, 3:] = -torch.inf
    logits[2, 1:] = -torch.inf
    found = check(logits, 64, temperatures=(1.0, 2.0))
    assert (found.ids[0] % 2 == 1).all()
    assert found.ids[1, 3:].tolist() == [-1] * 61 and (found.logprobs[1, 3:] == -torch.inf).all()
    assert found.logprobs[2, 0] == 0 and (found.tail_logprob[1:] == -torch.inf).all()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, "all masked"))
@pytest.mark.parametrize("where", (0, 77, 4999))
def test_bad_rows_stay_alone(bad, where):
    logits = rows(3, 5000)
    clean = compress_logits(logits, 8)
    if bad == "all masked":
        logits[1] = -torch.inf
    else:
        logits[1, where] = bad
    found = check(logits, 8, labels=torch.tensor([1, 2, 3]))
    assert found.valid.tolist() == [True, False, True]
    assert (found.ids[1] == -1).all() and found.tail_logprob[1].isnan().all()
    assert torch.equal(found.logprobs[[0, 2]], clean.logprobs[[0, 2]])


def test_tiny_tail_masses_are_exact():
    """1 - sum would be 0 here, or noise."""
    logits = torch.full((2, 3000), -30.0)
    logits[0, 5], logits[1, 5] = 60.0, 1e4
    found = check(logits, 1, atol=3e-5)
    torch.testing.assert_close(found.tail_logprob[0, 0].item(), math.log(2999) - 90, rtol=1e-7, atol=0)
    far = torch.tensor([[120.0, 0.0, -120.0, 119.0]])
    check(far, 2, atol=1e-5)
    check(far.double(), 2, atol=1e-12)


def test_large_logits_keep_their_digits():
    logits = rows(2, 3000) + 1e4
    check(logits, 16)


def test_layouts():
    logits = rows(6, 501)
    wide = torch.cat([logits, logits], 1)[:, :501]
    transposed = logits.t().contiguous().t()
    expanded = logits[:1].expand(6, 501)
    for view in (wide, transposed, expanded):
        check(view, 9)
    batched = check(logits.view(2, 3, 501), 9, labels=torch.zeros(2, 3, dtype=torch.int32))
    assert batched.ids.shape == (2, 3, 9) and batched.tail_logprob.shape == (2, 3, 1) and batched.valid.shape == (2, 3)
    assert check(logits[0], 9).ids.shape == (9,)


def test_no_rows():
    found = compress_logits(torch.empty(0, 3, 11), 4, labels=torch.empty(0, 3, dtype=torch.long))
    assert found.ids.shape == (0, 3, 4) and found.label_logprob.shape == (0, 3)


def test_results_do_not_depend_on_batch_or_threads():
    logits = rows(40, 3001)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = topk_logits(logits, None, None, 16, (1.0, 2.0), 0)
        torch.set_num_threads(1)
        for row in (0, 13, 39):
            alone = topk_logits(logits[row : row + 1], None, None, 16, (1.0, 2.0), 0)
            for of_all, of_one in zip(whole, alone, strict=True):
                assert len(of_all) == 0 or torch.equal(of_all[row : row + 1], of_one)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_row(data):
    vocab = data.draw(st.integers(1, 5000))
    levels = data.draw(st.sampled_from((2, 50, 10**6)))
    seed = data.draw(st.integers(0, 2**30))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (1, vocab), generator=generator).float() * (30 / levels)
    masked = torch.rand(1, vocab, generator=generator) < data.draw(st.sampled_from((0.0, 0.3, 0.999)))
    check(logits.masked_fill(masked, -torch.inf), data.draw(st.integers(1, 200)), temperatures=(1.0, 1.7))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("sample", (False, True))
@pytest.mark.parametrize("labelled", (False, True))
def test_opcheck(dtype, sample, labelled):
    labels = torch.tensor([1, 2, 3]) if labelled else None
    position = torch.tensor([4, 5, 6]) if sample else None
    arguments = (rows(3, 50, dtype), labels, position, 5, [1.0, 2.0], 7)
    torch.library.opcheck(torch.ops.distillm_ext.topk_logits.default, arguments)


@pytest.mark.parametrize("dynamic", [True, *full(False)])
@pytest.mark.parametrize("backend", ["aot_eager", *full("inductor")])
def test_compile_fullgraph(dynamic, backend):
    torch.compiler.reset()

    def step(hidden, labels):
        compressed = compress_logits(hidden * 2, 8, temperatures=(1.0, 2.0), labels=labels)
        return compressed[:, 1:], compressed.flatten().logprobs.sum()

    hidden, labels = rows(6, 70).view(2, 3, 70), torch.zeros(2, 3, dtype=torch.long)
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)
    (found, total), (expected, expected_total) = compiled(hidden, labels), step(hidden, labels)
    assert torch.equal(found.ids, expected.ids) and found.temperatures == (1.0, 2.0)
    torch.testing.assert_close(found.tail_logprob, expected.tail_logprob)
    torch.testing.assert_close(total, expected_total)


def test_no_gradient():
    logits = rows(2, 30).requires_grad_()
    assert not compress_logits(logits, 4).logprobs.requires_grad
