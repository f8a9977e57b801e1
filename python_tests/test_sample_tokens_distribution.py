"""The distribution of `sample_tokens`: chi-square, total variation, independence.

The default run is small. The long form prints its report; it takes a core about 15 minutes:

    pytest -m slow -s python_tests/test_sample_tokens_distribution.py python_tests/test_sample_tokens_tail.py

Seeds are fixed: a test passes always or never.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_oracle import Rule, expected
from scipy import stats

from distillm_ext import sample_tokens

FORMS = [pytest.param(1, id="short"), pytest.param(20, id="long", marks=pytest.mark.slow)]
BATCH = 5000  # rows of a call
PLAIN, FILTERED = [Rule(), Rule(0.7), Rule(min_p=0.02)], [Rule(0.8, 20, 0.9), Rule(top_p=0.95)]
RULES = PLAIN + FILTERED
# Seeds and draws from each.
SIZES = {"short": (100, 5000), "long plain": (2000, 40000), "long filtered": (1000, 10000)}


def draws(row: torch.Tensor, count: int, seed: int = 0, rule: Rule = Rule(), position: int = 0) -> np.ndarray:  # noqa: B008
    """Tokens of positions position, position + 1, ... of one sequence whose logits stay the same."""
    parts = []
    for start in range(position, position + count, BATCH):
        positions = torch.arange(start, min(start + BATCH, position + count))
        rows = row.expand(len(positions), -1)
        parts.append(sample_tokens(rows, seed=seed, position=positions, **rule.options()).tokens.numpy())
    return np.concatenate(parts)


def counts_of_seeds(row: torch.Tensor, seeds: range, count: int, rule: Rule = Rule()) -> np.ndarray:  # noqa: B008
    """[seeds, V]: how often each token came up among `count` draws."""
    return np.stack([np.bincount(draws(row, count, seed, rule), minlength=len(row)) for seed in seeds])


def chi_square(counts: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """p-value of each row of counts; tokens that are expected less than 20 times share a cell."""
    total = counts[0].sum()
    common = probability * total >= 20
    assert counts[:, probability == 0].sum() == 0
    observed = np.concatenate([counts[:, common], counts[:, ~common].sum(1, keepdims=True)], 1)
    ideal = np.append(probability[common], probability[~common].sum()) * total
    if ideal[-1] < 20:  # too few for a cell of their own
        observed[:, -2], ideal[-2] = observed[:, -2:].sum(1), ideal[-2:].sum()
        observed, ideal = observed[:, :-1], ideal[:-1]
    return stats.chi2.sf(((observed - ideal) ** 2 / ideal).sum(1), len(ideal) - 1)


@pytest.mark.parametrize(
    "rule,size",
    [(rule, "short") for rule in RULES]
    + [pytest.param(rule, "long plain", marks=pytest.mark.slow) for rule in PLAIN]
    + [pytest.param(rule, "long filtered", marks=pytest.mark.slow) for rule in FILTERED],
    ids=str,
)
def test_p_values_are_uniform_over_seeds(rule, size):
    torch.manual_seed(11)
    row = torch.randn(50) * 2
    case, (seeds, count) = expected(row.double().numpy(), rule), SIZES[size]
    assert case.margin > 1e-6
    first = 10**6 * RULES.index(rule)  # random numbers of its own for each rule
    values = chi_square(counts_of_seeds(row, range(first, first + seeds), count, rule), case.probability)
    uniformity = stats.kstest(values, "uniform").pvalue
    print(
        f"\nchi-square, {rule}: {seeds} seeds x {count} draws, smallest p {values.min():.2g}, "
        f"Kolmogorov-Smirnov p of the p-values {uniformity:.3f}"
    )
    assert uniformity > 1e-3 and values.min() > 1e-3 / seeds


@pytest.mark.parametrize("seeds", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_total_variation_against_its_null(seeds):
    """The distances of many seeds against as many and more of simulated multinomials: whole distributions are compared,
    since one seed says little (its z exceeds 2.8 in one of 200)."""
    torch.manual_seed(12)
    row = torch.randn(1000) * 2
    probability = expected(row.double().numpy(), Rule()).probability
    count = 40000

    def distance(counts: np.ndarray) -> np.ndarray:
        return np.abs(counts / count - probability).sum(-1) / 2

    got = distance(counts_of_seeds(row, range(seeds), count))
    null = distance(np.random.default_rng(0).multinomial(count, probability, size=10000))
    z = (got.mean() - null.mean()) / (null.std() / np.sqrt(seeds))
    p_value = stats.ks_2samp(got, null).pvalue
    print(
        f"\ntotal variation, {seeds} seeds x {count} draws: mean {got.mean():.6f}, null {null.mean():.6f}, z {z:.2f}; "
        f"spread {got.std() / null.std():.3f} of the null's; Kolmogorov-Smirnov p {p_value:.3f}"
    )
    assert abs(z) < 4 and p_value > 1e-3


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
