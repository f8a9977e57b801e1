"""`CompressedLogits` packed and unpacked by the operators: round trips, bounds, sums to 1, sizes, refusals."""

from __future__ import annotations

import re

import numpy as np
import packing_cases as cases
import pytest
import torch
from packing_cases import CODECS

from distillm_ext import CompressedLogits
from distillm_ext.packing import pack, record_bytes, unpack

SHAPES = [(1, 1), (7, 3), (50, 64), (1000, 1), (1000, 2), (1000, 64), (4096, 300), (65536, 5)]


def round_trip(case: cases.Case, codec: str) -> cases.Case:
    packed = pack(case.compressed(), codec)
    method = "topk" if case.counts is None else "sample"
    back = unpack(
        packed, codec=codec, k=case.k, vocab_size=case.vocab_size, temperatures=case.temperatures, method=method
    )
    return cases.from_compressed(back)


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("vocab,k", SHAPES)
def test_exact_is_bit_exact(vocab, k, method):
    for temperatures in ((1.0,), (2.0, 1.0, 0.5)):
        for labels in (True, False):
            case = cases.make(12, vocab, k, method, temperatures, labels)
            back = round_trip(case, "exact")
            for got, expected in zip(back.arrays(), case.arrays(), strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("codec", ["q4", "q6", "q8", "fp16"])
@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("vocab,k", SHAPES)
def test_lossy_round_trip(vocab, k, method, codec):
    case = cases.make(12, vocab, k, method)
    back = round_trip(case, codec)
    np.testing.assert_array_equal(back.valid, case.valid)
    kept, kept_back = cases.by_id(case), cases.by_id(back)
    assert kept.keys() == kept_back.keys()
    assert all(kept_back[place][1] == count for place, (_, count) in kept.items())
    for row in np.flatnonzero(case.valid):
        here = case.ids[row] >= 0
        expected = case.logprobs[row][here].astype(np.float64)
        got = np.array([kept_back[row, i][0] for i in case.ids[row][here].tolist()])
        bound = cases.value_bound(case, codec, row)
        assert (np.abs(got - expected) <= bound).all(), (row, got - expected, bound)
    with np.errstate(over="ignore"):
        tails = case.tail_logprob.astype(np.float16).astype(np.float32)
        labels = case.label_logprob.astype(np.float16).astype(np.float32)
    tails = np.where(np.isneginf(case.tail_logprob), -np.inf, np.maximum(tails, -65504))
    labels = np.where(np.isneginf(case.label_logprob), -np.inf, np.maximum(labels, -65504))
    forced = np.minimum(tails, np.float32(-(2.0**-24)))
    np.testing.assert_array_equal(back.tail_logprob, np.where(case.valid[:, None], forced, np.nan))
    np.testing.assert_array_equal(back.label_logprob, labels)
    padding = back.ids < 0
    assert np.isneginf(back.logprobs[padding]).all() and (back.ids[padding] == -1).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 3.0, 100.0])
def test_order_and_sums(codec, spread):
    """Sorted as promised, and at every temperature kept entries and tail sum to 1."""
    for vocab, k in ((40, 64), (3000, 64), (3000, 1)):
        case = cases.make(18, vocab, k, temperatures=(1.0, 2.0, 0.7), spread=spread)
        back = round_trip(case, codec)
        resorted = cases.canonical(back)
        if codec != "exact":
            np.testing.assert_array_equal(back.ids, resorted.ids)
        np.testing.assert_array_equal(back.logprobs, resorted.logprobs)
        values = back.logprobs[back.valid].astype(np.float64)
        assert (back.log_norm[back.valid, 0] == 0).all() or codec == "exact"
        for t, temperature in enumerate(case.temperatures):
            kept = np.exp(values / temperature - back.log_norm[back.valid, t, None]).sum(-1)
            np.testing.assert_allclose(kept + np.exp(back.tail_logprob[back.valid, t]), 1, atol=5e-6)


def test_without_temperature_one():
    """No tail at T = 1 to shift to: the largest value is a float16, sums at the given temperatures are still 1."""
    case = cases.make(12, 500, 16, temperatures=(2.0,))
    for codec in CODECS[:4]:
        back = round_trip(case, codec)
        kept = case.ids >= 0
        largest = case.logprobs[:, 0]
        np.testing.assert_allclose(back.logprobs[:, 0], largest, rtol=2.0**-11, atol=1e-7)
        total = np.exp(back.logprobs[case.valid] / 2 - back.log_norm[case.valid]).sum(-1)
        np.testing.assert_allclose(total + np.exp(back.tail_logprob[case.valid, 0]), 1, atol=5e-6)
        assert (back.logprobs[~kept] == -np.inf).all() and np.isfinite(back.logprobs[kept]).all()


def test_extreme_tails():
    """A tail that rounds to 0 leaves something for the kept entries; one below float16's range stays finite."""
    case = cases.make(4, 100, 2, temperatures=(1.0,))
    z = torch.tensor([[-1.7e1, -1.8e1], [-1e-7, -1e5], [-0.7, -0.7], [-0.7, -0.8]])
    tail = torch.tensor([[-6e-8], [-9e4], [-torch.inf], [-1.0]])
    compressed = case.compressed()
    fields = dict(ids=torch.tensor([[5, 3]] * 4, dtype=torch.int32), logprobs=z, tail_logprob=tail)
    compressed = type(compressed)(
        **fields,
        log_norm=torch.zeros(4, 1),
        label_logprob=torch.tensor([-1e5, -torch.inf, torch.nan, 0.0]),
        valid=torch.ones(4, dtype=torch.bool),
        counts=None,
        temperatures=(1.0,),
        vocab_size=100,
    )
    for codec in CODECS[:4]:
        back = unpack(pack(compressed, codec), codec=codec, k=2, vocab_size=100)
        assert back.tail_logprob[:, 0].tolist() == [-(2.0**-24), -65504.0, -torch.inf, -1.0]
        assert back.label_logprob[:2].tolist() == [-65504.0, -torch.inf]
        assert back.label_logprob[2].isnan() and back.label_logprob[3] == 0
        torch.testing.assert_close(back.logprobs.exp().sum(-1)[2:], 1 - tail.exp()[2:, 0], rtol=1e-6, atol=1e-6)
        assert back.logprobs[0].exp().sum() == pytest.approx(2.0**-24, rel=1e-3)
        assert back.logprobs[1, 0] == pytest.approx(0, abs=1e-6) and -1e5 * 1.01 < back.logprobs[1, 1] < -31


def test_sizes():
    assert record_bytes("q8", k=64, vocab_size=151_936) == 176
    assert record_bytes("q8", k=64, vocab_size=151_936, labels=False) == 174
    assert record_bytes("q8", k=12, vocab_size=151_936, method="sample") <= 52
    assert record_bytes("q8", k=50, vocab_size=151_936) > 127 > record_bytes("q4", k=50, vocab_size=151_936)
    case = cases.make(6, 1000, 16)
    for codec in CODECS:
        width = record_bytes(codec, k=16, vocab_size=1000, temperatures=case.temperatures)
        assert pack(case.compressed(), codec).shape == (6, width)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2), (0,), (2, 0)])
def test_shapes_and_methods_of_the_container(shape):
    count = int(np.prod(shape, dtype=int))
    compressed = cases.make(count, 300, 8).compressed().reshape(*shape)
    packed = compressed.pack("q6")
    assert packed.shape[:-1] == shape and packed.dtype == torch.uint8
    back = type(compressed).unpack(packed, codec="q6", k=8, vocab_size=300, temperatures=(1.0, 2.0))
    assert back.shape == shape and back.k == 8 and back.temperatures == (1.0, 2.0) and back.vocab_size == 300


def test_strided_input_and_float64():
    case = cases.make(12, 300, 8)
    compressed = case.compressed()
    assert torch.equal(compressed[::2].pack("q8"), compressed.pack("q8")[::2])
    packed = compressed.pack("q8")
    wide = torch.zeros(12, packed.shape[1] + 5, dtype=torch.uint8)
    wide[:, 3:-2] = packed
    back = unpack(wide[:, 3:-2], codec="q8", k=8, vocab_size=300, temperatures=(1.0, 2.0))
    assert torch.equal(back.ids, unpack(packed, codec="q8", k=8, vocab_size=300, temperatures=(1.0, 2.0)).ids)
    double = compressed._map(lambda x, _: x.double() if x.is_floating_point() else x)
    assert torch.equal(double.pack("q8"), packed)
    with pytest.raises(TypeError, match="exact"):
        double.pack("exact")


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda c, p: pack(p), TypeError, "compressed must be CompressedLogits"),
        (lambda c, p: pack(c, "q5"), ValueError, "codec must be one of"),
        (lambda c, p: unpack(p.float(), codec="q8", k=8, vocab_size=300), TypeError, "torch.float32"),
        (lambda c, p: unpack(p, codec="q8", k=9, vocab_size=300, temperatures=(1.0, 2.0)), ValueError, "packed must"),
        (lambda c, p: unpack(p, codec="q8", k=8, vocab_size=300, method="both"), ValueError, "method must be"),
        (lambda c, p: unpack(p, codec="q8", k=0, vocab_size=300), ValueError, "k must lie in 1..4096, got 0"),
        (lambda c, p: unpack(p, codec="q8", k=8, vocab_size=0), ValueError, "vocab_size must lie in"),
        (lambda c, p: unpack(p, codec="q8", k=8, vocab_size=300, temperatures=(0.0,)), ValueError, "temperatures"),
        (lambda c, p: unpack(p, codec="q8", k=8, vocab_size=300, temperatures=2.0), TypeError, "temperatures"),
    ],
)
def test_refusals(call, error, words):
    compressed = cases.make(3, 300, 8).compressed()
    with pytest.raises(error, match=words):
        call(compressed, compressed.pack("q8"))


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_operators_pass_opcheck_and_compile(method):
    case = cases.make(5, 300, 8, method)
    numbers = cases.from_compressed(case.compressed()[2:])  # without NaN, which opcheck finds unequal to itself
    tensors = [None if x is None else torch.from_numpy(x) for x in numbers.arrays()]
    torch.library.opcheck(torch.ops.distillm_ext.pack_logits.default, (*tensors, 300, [1.0, 2.0], "q8"))
    packed = numbers.compressed().pack("q8")
    torch.library.opcheck(
        torch.ops.distillm_ext.unpack_logits.default, (packed, "q8", 8, 300, [1.0, 2.0], True, method == "sample")
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def there_and_back(compressed):
        packed = compressed.pack("q8")
        return compressed.unpack(packed, codec="q8", k=8, vocab_size=300, temperatures=(1.0, 2.0), method=method)

    compiled = there_and_back(case.compressed())
    expected = round_trip(case, "q8").compressed()
    assert torch.equal(compiled.ids, expected.ids) and torch.equal(compiled.logprobs, expected.logprobs)


@pytest.mark.parametrize("read", [unpack, CompressedLogits.unpack], ids=["function", "method"])
@pytest.mark.parametrize(
    "packed", [[1], None, np.zeros((2, 20), np.uint8), torch.zeros(2, 20), torch.zeros(2, 20).char()]
)
def test_what_is_no_packed_tensor_is_refused_before_any_kernel(read, packed):
    with pytest.raises(TypeError, match="packed must be a tensor of dtype torch.uint8, got"):
        read(packed, codec="q8", k=8, vocab_size=300)


@pytest.mark.parametrize("read", [unpack, CompressedLogits.unpack], ids=["function", "method"])
def test_a_wrong_width_is_named_with_the_shape_given(read):
    for shape in ((2, 4, 5), ()):
        with pytest.raises(ValueError, match=re.escape(f"got {list(shape)}")):
            read(torch.zeros(shape, dtype=torch.uint8), codec="q8", k=8, vocab_size=300)
