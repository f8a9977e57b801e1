"""Far tails of `sample_tokens`: tokens 15 to 22 nats below the most probable one come up as often as they should.

The long form prints its report: see test_sample_tokens_distribution.py. Seeds are fixed: a test passes always or never.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillm_ext import sample_tokens
from distillm_ext.ops.sample_tokens import sample_tokens as operator

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def tail_row(vocab: int, depth: float) -> torch.Tensor:
    """One token in the middle, all others `depth` nats below it: draws near both ends hit the tail."""
    row = torch.full((vocab,), -depth)
    row[vocab // 2] = 0.0
    return row


def tail_mass(vocab: int, depth: float) -> float:
    """Probability of the tail."""
    tail = (vocab - 1) * np.exp(-depth)
    return tail / (1 + tail)


def score(name: str, hits: int, mean: float) -> float:
    z = (hits - mean) / np.sqrt(mean)
    print(f"\n{name}: {hits} hits, {mean:.1f} expected, z {z:.2f}")
    return z


def tail_hits(vocab: int, depth: float, count: int, seed: int = 5) -> int:
    row = tail_row(vocab, depth).expand(count, -1)
    return int((sample_tokens(row, seed=seed, position=torch.arange(count)).tokens != vocab // 2).sum())


@pytest.mark.parametrize("depth,vocab,count", [(15.0, 2048, 1 << 17), (17.0, 8192, 1 << 15)])
def test_far_tail(depth, vocab, count):
    mean = count * tail_mass(vocab, depth)
    assert mean > 10 and abs(score(f"{depth} nats", tail_hits(vocab, depth, count), mean)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("depth,log2_count", [(15.0, 16), (17.0, 17), (19.0, 18), (20.0, 19), (21.0, 20), (22.0, 21)])
def test_far_tail_by_drawing(depth, log2_count):
    """Every draw is made."""
    count = 1 << log2_count
    mean = count * tail_mass(32768, depth)
    assert mean > 15 and abs(score(f"{depth} nats, {count} draws", tail_hits(32768, depth, count), mean)) < 4


def philox_words(position: np.ndarray, seed: int) -> np.ndarray:
    """64 random bits per position, as csrc/math/sampling/philox.h defines them, written again on arrays."""
    mask = np.uint64(0xFFFFFFFF)
    c = [position & mask, position >> np.uint64(32), np.zeros_like(position), np.zeros_like(position)]
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(product1 >> np.uint64(32)) ^ c[1] ^ np.uint64(key0), product1 & mask,
             (product0 >> np.uint64(32)) ^ c[3] ^ np.uint64(key1), product0 & mask]  # fmt: skip
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c[1] << np.uint64(32) | c[0]


def scanned_tail(vocab: int, depth: float, count: int, seed: int) -> tuple[int, int]:
    """Hits among `count` positions, and how many positions were drawn from: those whose random bits, computed here, lie
    near an end of the draw, twice as far as the tail reaches. The draws themselves are the operator's, by seed and
    position. Their tokens are those of the inverse cumulative distribution in float64, but for steps of rounding."""
    share, hits, drawn, step = tail_mass(vocab, depth), 0, 0, 1 << 20
    middle, row = vocab // 2, tail_row(vocab, depth)
    reach = np.uint64(int(share * 2.0**64))
    for start in range(0, count, step):
        position = np.arange(start, start + step, dtype=np.uint64)
        bits = philox_words(position, seed)
        near = np.minimum(bits, ~bits) < reach
        position, uniform = position[near], bits[near].astype(np.float64) * 2.0**-64
        tokens = sample_tokens(
            row.expand(len(position), -1), seed=seed, position=torch.from_numpy(position.astype(np.int64))
        ).tokens.numpy()
        from_end = np.minimum(uniform, (~bits[near]).astype(np.float64) * 2.0**-64)
        each = share / (vocab - 1)
        steps = np.minimum(np.floor(from_end / each), middle)
        ideal = np.where(uniform < 0.5, np.minimum(steps, middle), np.maximum(vocab - 1 - steps, middle))
        # weights are multiples of 2^-44: 22 nats down one is right to 1 part in 4900
        assert np.abs(tokens - ideal).max(initial=0) <= 1 + 1e-3 * vocab
        hits += int((tokens != middle).sum())
        drawn += len(position)
    return hits, drawn


@pytest.mark.parametrize("form", [1, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("depth", [19.0, 20.0, 21.0, 22.0])
def test_far_tail_by_scanning(depth, form):
    """Many hits from few draws, with the counter-based bits of all positions; elsewhere a sample is drawn."""
    vocab, seed = 16384, 0x123456789ABCDEF + int(depth)
    count = form << 20
    hits, drawn = scanned_tail(vocab, depth, count, seed)
    mean = count * tail_mass(vocab, depth)
    assert drawn >= hits and abs(score(f"{depth} nats, {count} positions, {drawn} drawn", hits, mean)) < 4
    position = torch.arange(2000) * 97
    bits = philox_words(position.numpy().astype(np.uint64), seed)
    row = tail_row(vocab, depth).expand(2000, -1)
    by_position = sample_tokens(row, seed=seed, position=position).tokens
    by_bits = operator(row, bits=torch.from_numpy(bits.view(np.int64)), seed=0, position=0, **PLAIN)[0]
    assert torch.equal(by_position, by_bits)


def test_all_random_bits_count():
    """Tokens of which each has 2⁻³⁷ of the draw, so that both words of the random bits decide: the positions that hit
    the tail, found by computing their bits here, draw the tokens that these bits draw."""
    vocab, depth, seed = 1 << 19, 26.0, 77
    row = tail_row(vocab, depth)
    reach = np.uint64(int(tail_mass(vocab, depth) * 2.0**63))
    position = np.concatenate([
        start + np.flatnonzero(np.minimum(bits, ~bits) < reach)
        for start in range(0, 1 << 22, 1 << 20)
        for bits in [philox_words(np.arange(start, start + (1 << 20), dtype=np.uint64), seed)]
    ])  # fmt: skip
    bits = torch.from_numpy(philox_words(position.astype(np.uint64), seed).view(np.int64))
    rows = row.expand(len(position), -1)
    tokens = sample_tokens(rows, seed=seed, position=torch.from_numpy(position)).tokens
    assert (tokens != vocab // 2).sum() > 2
    assert torch.equal(tokens, operator(rows, bits=bits, seed=0, position=0, **PLAIN)[0])


def test_tail_is_resolved_token_by_token():
    """At 22 nats every tail token has a share of the draw, in order, and of the right width."""
    depth, vocab = 22.0, 1001
    row = torch.full((vocab,), -depth)
    row[0] = 0.0
    each = np.exp(-depth) / (1 + (vocab - 1) * np.exp(-depth))
    centres = 1 - each * (np.arange(vocab - 1, 0, -1) - 0.5)
    bits = torch.tensor([int(u * 2.0**64) - 2**64 for u in centres])
    tokens, _, filtered, _ = operator(row.expand(vocab - 1, -1), bits=bits, seed=0, position=0, **PLAIN)
    assert (tokens.numpy() == np.arange(1, vocab)).mean() > 0.999  # 2⁻⁵³ steps of the test's own uniforms
    np.testing.assert_allclose(filtered, np.log(each), rtol=1e-4)
