"""The distribution of `sample_tokens`: chi-square, total variation, far tails, independence.

The default run is small; `pytest -m slow -s` on this file runs the long form and prints its report. Seeds are fixed: a
test passes always or never.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_oracle import Rule, expected
from scipy import stats

from distillm_ext import sample_tokens

FORMS = [pytest.param(1, id="short"), pytest.param(20, id="long", marks=pytest.mark.slow)]


def draws(row: torch.Tensor, count: int, seed: int = 0, rule: Rule = Rule(), position: int = 0) -> np.ndarray:  # noqa: B008
    """Tokens of positions position, position + 1, ... of one sequence whose logits stay the same."""
    positions = torch.arange(position, position + count)
    return sample_tokens(row.expand(count, -1), seed=seed, position=positions, **rule.options()).tokens.numpy()


def chi_square(tokens: np.ndarray, probability: np.ndarray) -> float:
    """p-value, rare tokens pooled so that every cell expects 5 or more."""
    order = np.argsort(-probability)
    cells = np.minimum(np.cumsum(probability[order] * len(tokens) >= 5), np.inf).astype(int)
    cell_of = np.empty(len(probability), int)
    cell_of[order] = cells
    observed = np.bincount(cell_of[tokens], minlength=cells.max() + 1)
    ideal = np.bincount(cell_of, weights=probability, minlength=cells.max() + 1) * len(tokens)
    used = ideal > 0
    assert observed[~used].sum() == 0
    statistic = ((observed[used] - ideal[used]) ** 2 / ideal[used]).sum()
    return float(stats.chi2.sf(statistic, used.sum() - 1)) if used.sum() > 1 else 1.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", [Rule(), Rule(0.7), Rule(0.8, 20, 0.9), Rule(top_p=0.95), Rule(min_p=0.02)], ids=str)
def test_p_values_are_uniform_over_seeds(rule, form):
    torch.manual_seed(11)
    row = torch.randn(200) * 2
    probability = expected(row.double().numpy(), rule).probability
    values = [chi_square(draws(row, 2000 * form, seed, rule), probability) for seed in range(100 * form)]
    uniformity = stats.kstest(values, "uniform").pvalue
    print(f"\n{rule}: {len(values)} seeds, smallest p {min(values):.2g}, uniformity of p-values {uniformity:.3f}")
    assert uniformity > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_total_variation_against_its_null(form):
    torch.manual_seed(12)
    row = torch.randn(1000) * 2
    probability = expected(row.double().numpy(), Rule()).probability
    count = 20000 * form

    def distance(counts: np.ndarray) -> np.ndarray:
        return np.abs(counts / count - probability).sum(-1) / 2

    got = distance(np.bincount(draws(row, count), minlength=1000))
    null = distance(np.random.default_rng(0).multinomial(count, probability, size=400))
    z = (got - null.mean()) / null.std()
    print(f"\ntotal variation {got:.5f}, null {null.mean():.5f} ± {null.std():.5f}, z {z:.2f}")
    assert abs(z) < 4


def tail_score(vocab: int, depth: float, count: int) -> tuple[int, float, float]:
    """Hits on vocab - 1 tokens `depth` nats below the first, the expectation, and the z-score."""
    row = torch.full((vocab,), -depth)
    row[vocab // 2] = 0.0
    hits = int((draws(row, count, seed=5) != vocab // 2).sum())
    tail = (vocab - 1) * np.exp(-depth)
    mean = count * tail / (1 + tail)
    return hits, mean, (hits - mean) / np.sqrt(mean)


@pytest.mark.parametrize("depth,vocab,count", [(15.0, 2048, 1 << 17), (17.0, 8192, 1 << 15)])
def test_far_tail(depth, vocab, count):
    hits, mean, z = tail_score(vocab, depth, count)
    assert mean > 10 and abs(z) < 4, (hits, mean, z)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [15.0, 17.0, 19.0, 20.0, 21.0, 22.0])
def test_far_tail_long(depth):
    vocab, count = 32768, 1 << 21
    hits, mean, z = tail_score(vocab, depth, count)
    print(f"\n{depth} nats: {hits} hits, {mean:.1f} expected, z {z:.2f}")
    assert mean > 10 and abs(z) < 4


def test_tail_is_resolved_token_by_token():
    """At 22 nats every tail token has a share of the draw, in order, and of the right width."""
    depth, vocab = 22.0, 1001
    row = torch.full((vocab,), -depth)
    row[0] = 0.0
    from distillm_ext.ops.sample_tokens import sample_tokens as operator

    each = np.exp(-depth) / (1 + (vocab - 1) * np.exp(-depth))
    centres = 1 - each * (np.arange(vocab - 1, 0, -1) - 0.5)
    bits = torch.tensor([int(u * 2.0**64) - 2**64 for u in centres])
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0}
    tokens, _, filtered, _ = operator(row.expand(vocab - 1, -1), bits=bits, **options)
    assert (tokens.numpy() == np.arange(1, vocab)).mean() > 0.999  # 2⁻⁵³ steps of the test's own uniforms
    np.testing.assert_allclose(filtered, np.log(each), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("along", ["positions", "seeds", "seeds 2^32 apart"])
def test_successive_draws_are_independent(along, form):
    row = torch.tensor([0.0, 1.0, -0.5, 0.3])
    count = 40000 * form
    steps = torch.arange(count)
    if along == "positions":
        tokens = draws(row, count)
    else:
        seeds = steps << 32 if "apart" in along else steps
        tokens = sample_tokens(row.expand(count, -1), seed=seeds, position=3).tokens.numpy()
    for lag in (1, 2, 7, 64):
        table = np.histogram2d(tokens[:-lag], tokens[lag:], bins=(4, 4), range=((0, 4), (0, 4)))[0]
        p_value = stats.chi2_contingency(table).pvalue
        print(f"\n{along}, lag {lag}: p {p_value:.3f}")
        assert p_value > 1e-4


def test_sequences_do_not_share_their_draws():
    """Rows of different seeds at the same positions, and the same seed at shifted positions."""
    row = torch.zeros(1 << 16)
    a, b = draws(row, 100, seed=1), draws(row, 100, seed=2)
    assert (a == b).sum() <= 1 and (a[1:] == b[:-1]).sum() <= 1
    np.testing.assert_array_equal(a[40:], draws(row, 60, seed=1, position=40))
