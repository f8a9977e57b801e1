"""`compress_logits` with method "sample", `capture_from_hidden`, the container, and argument checks."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree  # noqa: PLC2701  (torch has no public name for it)

from distillm_ext import CompressedLogits, capture_from_hidden, compress_logits
from distillm_ext.reference.compression import compress_logits_reference, philox4x32

FIELDS = ("ids", "logprobs", "log_norm", "tail_logprob", "label_logprob", "valid", "counts")


def rows(count, vocab, dtype=torch.float32, seed=0, spread=3.0):
    # NumPy's numbers are the same on every CPU; torch's depend on its vector width.
    values = np.random.default_rng(seed).standard_normal((count, vocab)) * spread
    return torch.from_numpy(values.astype(np.float32)).to(dtype)


def assert_same(a, b, **tolerances):
    assert (a.temperatures, a.vocab_size) == (b.temperatures, b.vocab_size)
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y.to(x.dtype), equal_nan=True, **tolerances)


def test_philox_known_vectors():
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("vocab", (1, 7, 33, 1025, 5003))
@pytest.mark.parametrize("k", (1, 24, 300))
def test_sample_against_reference(dtype, vocab, k):
    """Equal draws: none here falls within rounding of a boundary between entries."""
    logits, position = rows(4, vocab, dtype, seed=1), torch.tensor([0, 5, 2**40, -3])
    options = dict(method="sample", seed=11, position=position, temperatures=(1.0, 2.0), labels=torch.zeros(4).long())
    found, expected = compress_logits(logits, k, **options), compress_logits_reference(logits.double(), k, **options)
    assert_same(found, expected, rtol=3e-7, atol=2e-6)
    assert (found.counts.sum(-1) == k).all() and found.method == "sample"


def test_sample_is_unbiased():
    """E[c / N] = p. The position draws u; 4000 of them, and counts vary by at most 1/2 around N p."""
    logits, draws, repeats = rows(1, 40, torch.float64, spread=2.0), 7, 4000
    found = compress_logits(logits.expand(repeats, 40), draws, method="sample", position=torch.arange(repeats), seed=3)
    total = torch.zeros(41, dtype=torch.float64)
    total.index_add_(0, found.ids.flatten().long() % 41, found.counts.flatten().double())
    p, share = logits.softmax(-1)[0], total[:40] / (draws * repeats)
    fraction = draws * p - (draws * p).floor()  # a count is floor(N p) or one more
    deviation = (fraction * (1 - fraction) / repeats).sqrt() / draws
    z = (share - p) / deviation
    assert z.abs().max() < 4.5 and 0.5 < z.std() < 1.5
    assert ((found.counts - draws * p[found.ids.long()]).abs()[found.ids >= 0] < 1).all()


def test_sampled_log_probabilities_estimate_the_entropy():
    """sum c/N log p is unbiased for -H: exact log-probabilities beside the counts."""
    logits, repeats = rows(1, 500, torch.float64), 2000
    found = compress_logits(logits.expand(repeats, 500), 12, method="sample", position=torch.arange(repeats))
    estimates = (found.counts * found.logprobs.masked_fill(found.counts == 0, 0)).sum(-1) / 12
    p = logits.softmax(-1)
    expected = (p * p.log()).sum()
    assert (estimates.mean() - expected).abs() < 4.5 * estimates.std() / repeats**0.5


def test_draws_depend_on_seed_and_position_alone():
    logits = rows(30, 3001)
    position = torch.arange(30) * 7

    def draw(rows, positions, seed=5):
        return compress_logits(rows, 16, method="sample", seed=seed, position=positions)

    whole = draw(logits, position)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert_same(draw(logits[order], position[order]), whole[order], rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    assert_same(draw(logits[3:4], position[3:4]), whole[3:4], rtol=0, atol=0)
    assert not torch.equal(draw(logits, position, seed=6).ids, whole.ids)
    assert not torch.equal(draw(logits, position + 1).ids, whole.ids)
    assert torch.equal(draw(logits, position, seed=2**64 - 1).ids, draw(logits, position, seed=-1).ids)


def test_sample_of_masked_and_bad_rows():
    logits = rows(6, 500)
    logits[1, 3], logits[2, 400], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, ::2], logits[5, 1:] = -torch.inf, -torch.inf
    found = compress_logits(logits, 20, method="sample", position=torch.arange(6))
    assert found.valid.tolist() == [True, False, False, False, True, True]
    assert (found.ids[1:4] == -1).all() and (found.counts[1:4] == 0).all() and found.log_norm[1:4].isnan().all()
    assert (found.ids[4][found.counts[4] > 0] % 2 == 1).all()
    assert found.ids[5].tolist() == [0] + [-1] * 19 and found.counts[5, 0] == 20


@pytest.mark.parametrize("chunk_rows", (None, 1, 4, 100))
@pytest.mark.parametrize("method", ("topk", "sample"))
def test_capture_from_hidden(chunk_rows, method):
    hidden, weight, bias = rows(10, 16).view(2, 5, 16), rows(300, 16, seed=1), rows(1, 300, seed=2)[0]
    labels = torch.arange(10).view(2, 5)
    options = dict(method=method, temperatures=(1.0, 2.0), labels=labels)
    if method == "sample":
        options |= dict(position=labels, seed=4)
    logits = 5 * torch.tanh(0.5 * (hidden @ weight.t() + bias) / 5)
    expected = compress_logits(logits, 12, **options)
    found = capture_from_hidden(hidden, weight, 12, bias=bias, softcap=5.0, scale=0.5, chunk_rows=chunk_rows, **options)
    assert_same(found, expected, rtol=1e-5, atol=1e-5)


def test_capture_converts_and_keeps_little():
    hidden, weight = rows(64, 32), rows(20000, 32, torch.bfloat16, seed=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        found = capture_from_hidden(hidden, weight, 8, chunk_rows=4)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 2 * 4 * 20000 * 2 + 2**17
    assert_same(found, compress_logits((hidden.bfloat16() @ weight.t()), 8), rtol=2e-2, atol=0.1)


def test_capture_without_rows():
    found = capture_from_hidden(torch.empty(0, 4), torch.randn(9, 4), 3)
    assert found.ids.shape == (0, 3)


def example(method="topk"):
    position = torch.arange(6).view(2, 3) if method == "sample" else None
    return compress_logits(
        rows(6, 50).view(2, 3, 50), 8, method=method, position=position, temperatures=(1.0, 2.0),
        labels=torch.zeros(2, 3, dtype=torch.long),
    )  # fmt: skip


@pytest.mark.parametrize("method", ("topk", "sample"))
@pytest.mark.parametrize(
    "index",
    (0, -1, slice(1), (1, 2), (slice(None), 0), torch.tensor([1, 0]), torch.tensor([[True, False, True]] * 2), ...,
     None, (..., 1), (torch.tensor([0, 1]), torch.tensor([2, 0]))),
)  # fmt: skip
def test_indexing_selects_positions(method, index):
    compressed = example(method)
    found = compressed[index]
    positions = torch.arange(6).view(2, 3)[index]
    assert found.shape == positions.shape and found.method == method and found.k == 8
    flat = compressed.flatten()[positions.reshape(-1)]
    assert_same(found.flatten(), flat, rtol=0, atol=0)


def test_indexing_never_reaches_into_entries():
    for index in ((0, 1, 2), torch.zeros(2, 3, 8, dtype=torch.bool)):
        with pytest.raises(IndexError, match="positions"):
            example()[index]


def test_container_moves_reshapes_and_maps():
    compressed = example("sample")
    assert compressed.to("cpu").device.type == "cpu" and len(compressed) == 2
    assert compressed.reshape(3, 2).shape == (3, 2) and compressed.reshape((6,)).shape == (6,)
    with pytest.raises(TypeError, match="len"):
        len(compressed[0, 0])
    doubled = pytree.tree_map(lambda x: torch.cat([x, x]), compressed)
    assert isinstance(doubled, CompressedLogits) and doubled.shape == (4, 3) and doubled.temperatures == (1.0, 2.0)
    assert_same(pickle.loads(pickle.dumps(compressed)), compressed, rtol=0, atol=0)  # to a data-loader worker


BAD = [
    (dict(logits=[[1.0]]), TypeError, "logits must be a tensor"),
    (dict(logits=torch.zeros(2, 9, dtype=torch.int32)), TypeError, "logits must be float32"),
    (dict(logits=torch.zeros(2, 0)), ValueError, r"V >= 1, got \[2, 0\]"),
    (dict(k=0), ValueError, "k must lie in 1..4096, or up to the vocabulary of "),
    (dict(k=4097), ValueError, "k must lie"),
    (dict(k=2.0), TypeError, "k must be an int"),
    (dict(method="best"), ValueError, "method must be one of 'topk', 'sample'"),
    (dict(method="sample"), ValueError, "needs position"),
    (dict(position=torch.arange(2)), ValueError, "for method='sample' only"),
    (dict(method="sample", position=torch.arange(3)), ValueError, r"position must have one entry .* \[2\], got \[3\]"),
    (dict(method="sample", position=torch.rand(2)), TypeError, "position must be an integer tensor"),
    (dict(labels=torch.zeros(2)), TypeError, "labels must be an integer tensor"),
    (dict(labels=torch.zeros(3).long()), ValueError, "labels must have one entry"),
    (dict(labels=[1, 2]), TypeError, "labels must be a tensor"),
    (dict(temperatures=1.0), TypeError, "temperatures must be a tuple"),
    (dict(temperatures=()), ValueError, "1 to 16 numbers, got 0"),
    (dict(temperatures=(1.0, 0.0)), ValueError, "temperatures must lie between"),
    (dict(temperatures=(float("nan"),)), ValueError, "temperatures must lie between"),
    (dict(temperatures=("1",)), TypeError, "temperatures must be numbers"),
    (dict(seed=0.5), TypeError, "seed must be an int"),
    (dict(seed=2**64), ValueError, "64 bits"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_arguments(change, error, message):
    arguments = dict(logits=torch.zeros(2, 9), k=4) | change
    with pytest.raises(error, match=message):
        compress_logits(**arguments)


def test_bad_heads():
    hidden, weight = torch.zeros(2, 4), torch.zeros(9, 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        capture_from_hidden(hidden, torch.zeros(9, 5))
    with pytest.raises(ValueError, match="bias must have shape"):
        capture_from_hidden(hidden, weight, bias=torch.zeros(8))
    with pytest.raises(ValueError, match="softcap must be positive"):
        capture_from_hidden(hidden, weight, softcap=0.0)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        capture_from_hidden(hidden, weight, chunk_rows=0)
