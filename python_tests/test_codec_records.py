"""Packed records through the NumPy codec: the operators' bytes, any bytes are safe, trimming loses nothing."""

from __future__ import annotations

import numpy as np
import packing_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import CODECS

from distillm_ext import _codec  # noqa: PLC2701  (the compiled codec, imported without torch)

SHAPES = st.tuples(st.sampled_from([1, 2, 31, 300, 4097]), st.integers(1, 70))
METHODS = st.sampled_from(["topk", "sample"])


@settings(max_examples=60, deadline=None)
@given(SHAPES, METHODS, st.sampled_from(CODECS), st.booleans(), st.integers(0, 99), st.sampled_from([0.0, 1.0, 30.0]))
def test_bytes_of_the_operator_and_trimming(shape, method, codec, labels, seed, spread):
    case = cases.make(5, *shape, method, (1.0, 2.0), labels, seed, spread)
    packed = case.pack(codec)
    assert torch.equal(case.compressed().pack(codec), torch.from_numpy(packed))
    back = case.unpack(packed, codec)
    assert cases.by_id(back).keys() == cases.by_id(case).keys()
    trimmed, offsets = _codec.trim_records(packed, *case.settings(codec))
    np.testing.assert_array_equal(_codec.restore_records(trimmed, offsets, *case.settings(codec)), packed)
    if method == "sample" and codec != "exact":
        # Codes on a grid that holds its own values: packing what was unpacked finds the same ids and counts.
        again = case.unpack(back.pack(codec), codec)
        assert {key: value[1] for key, value in cases.by_id(again).items()} == {
            key: value[1] for key, value in cases.by_id(case).items()
        }


@settings(max_examples=120, deadline=None)
@given(SHAPES, METHODS, st.sampled_from(CODECS), st.integers(0, 2**32 - 1))
def test_any_bytes_are_safe(shape, method, codec, seed):
    rng = np.random.default_rng(seed)
    name = (codec, shape[1], shape[0], (1.0, 0.5), True, method == "sample")
    packed = rng.integers(0, 256, (4, _codec.record_bytes(*name)), dtype=np.uint8)
    ids, logprobs, _, _, _, valid, counts = _codec.unpack_logits(packed, *name)
    assert ids.min() >= -1 and ids.max() < shape[0]
    if codec != "exact":
        assert not (logprobs > 0).any() and (ids[~valid] == -1).all()
    assert counts is None or (counts.min() >= 0)
    flat = rng.integers(0, 256, rng.integers(0, 300), dtype=np.uint8)
    offsets = rng.integers(-5, 300, 3)
    try:
        _codec.restore_records(flat, offsets, *name)
    except ValueError as error:
        assert "is damaged or of other settings" in str(error)


@pytest.mark.parametrize(
    "change,error,words",
    [
        (dict(logprobs=np.zeros((3, 5), np.float32)), ValueError, r"logprobs must have shape \[3, 4\], got \[3, 5\]"),
        (dict(valid=np.ones(2, bool)), ValueError, r"valid must have shape \[3\], got \[2\]"),
        (dict(tail_logprob=np.zeros((3, 1), np.float32)), ValueError, "tail_logprob must have shape"),
        (dict(ids=np.zeros(3, np.int32)), ValueError, "ids must have two dimensions"),
        (dict(ids=np.zeros((3, 4), np.int64)), TypeError, "incompatible"),
        (dict(logprobs=np.zeros((4, 3), np.float32).T), TypeError, "incompatible"),
    ],
)
def test_refusals(change, error, words):
    values = dict(zip(["ids", "logprobs", "log_norm", "tail_logprob", "label_logprob", "valid", "counts"],
                      cases.make(3, 50, 4).arrays(), strict=True))  # fmt: skip
    with pytest.raises(error, match=words):
        _codec.pack_logits(*{**values, **change}.values(), 50, (1.0, 2.0), "q8")
    with pytest.raises(ValueError, match="packed must have shape"):
        _codec.unpack_logits(np.zeros((3, 7), np.uint8), "q8", 4, 50, (1.0,), True, False)


def test_a_record_of_a_larger_k_is_refused():
    large, small = cases.make(1, 300, 9, temperatures=(1.0,)), cases.make(1, 300, 8, temperatures=(1.0,))
    trimmed, offsets = _codec.trim_records(large.pack("q8"), *large.settings("q8"))
    with pytest.raises(ValueError, match="record 0 is damaged or of other settings"):
        _codec.restore_records(trimmed, offsets, *small.settings("q8"))


@pytest.mark.parametrize("codec", list(cases.BITS))
def test_half_a_step_is_the_error_below_the_largest(codec):
    case = cases.make(60, 3000, 48, temperatures=(1.0,), spread=2.0)
    plain = np.arange(60) % 6 == 0  # ordinary rows
    back = case.unpack(case.pack(codec), codec)
    for row in np.flatnonzero(plain):
        expected = dict(zip(case.ids[row], case.logprobs[row].max() - case.logprobs[row], strict=True))
        got = back.logprobs[row].max() - back.logprobs[row]
        step = max(expected.values()) / (2 ** cases.BITS[codec] - 1)
        errors = [abs(value - expected[i]) for i, value in zip(back.ids[row], got, strict=True)]
        assert max(errors) < 0.51 * step + 2.0**-11 * max(expected.values())
