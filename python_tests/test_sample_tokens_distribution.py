"""The distribution of `sample_tokens`: chi-square, total variation, independence.

The default run is small; `pytest -m slow -s` on this file and test_sample_tokens_tail.py runs the long form and prints
its report, in minutes. Seeds are fixed: a test passes always or never.
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
    values = [
        chi_square(draws(row, 2000 if form == 1 else 5000, seed, rule), probability)
        for seed in range(100 if form == 1 else 400)
    ]
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
