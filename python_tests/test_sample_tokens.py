"""`sample_tokens` on the CPU against the float64 oracle: kept sets, draws, log-probabilities, edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_oracle import Rule, adjusted, bits_at, centres, expected
from tiers import full

from distillm_ext import sample_tokens
from distillm_ext.ops.sample_tokens import sample_tokens as sample_op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_BITS = torch.tensor([0, 1, (1 << 63) - 1, -(1 << 63), -1])  # both ends of the draw and its middle
RULES = [
    Rule(), Rule(0.8), Rule(2.0), Rule(top_k=1), Rule(top_k=7), Rule(0.7, 50), Rule(top_k=10**6),
    Rule(top_p=0.9), Rule(0.8, top_p=0.3), Rule(top_p=1e-6), Rule(top_p=0.999), Rule(min_p=0.05), Rule(1.5, min_p=1.0),
    Rule(0.8, 50, 0.9), Rule(1.2, 20, 0.95, 0.02), Rule(top_k=3, top_p=0.5), Rule(3.0, 100, 0.99, 0.5),
]  # fmt: skip


def draw_at(row: torch.Tensor, rule: Rule, bits, **lists):
    """The row drawn from once for each of the given bits."""
    bits = torch.as_tensor(np.asarray(bits))
    options = {"seed": 0, "position": 0, **rule.options(), **lists}
    if "previous_tokens" in lists:
        options["previous_tokens"] = lists["previous_tokens"].expand(len(bits), -1)
    return sample_op(row.expand(len(bits), -1), bits=bits, **options)


def thinned(most: int | None, *arrays: np.ndarray) -> list[np.ndarray]:
    length = len(arrays[0])
    chosen = np.linspace(0, length - 1, most).astype(int) if most and length > most else slice(None)
    return [array[chosen] for array in arrays]


def check_row(row: torch.Tensor, rule: Rule, z: np.ndarray | None = None, most: int | None = None, **lists) -> None:
    """Every token of the oracle's kept set (or `most` of them, evenly spaced) is drawn in the middle of its
    share, with its log-probabilities; nothing else is drawn at the ends. Where a cumulative mass lies within 1e-6 of a
    threshold the set is known but for the tokens in between: nothing beyond them is drawn, everything before them is,
    and shares move by that much."""
    raw = row.double().numpy()
    z = raw if z is None else z
    case = expected(z, rule)
    clear = case.margin >= 1e-6
    tokens, bits = thinned(most, *centres(case, 1e-6 if clear else 1e-5))
    got, logprob, filtered, valid = draw_at(row, rule, bits, **lists)
    assert valid.all()
    np.testing.assert_array_equal(got.numpy(), tokens)
    log_softmax = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
    np.testing.assert_allclose(logprob.numpy(), log_softmax[tokens], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(filtered.numpy(), np.log(case.probability[tokens]), rtol=1e-5, atol=2e-5)
    ends = torch.cat([ALL_BITS, torch.from_numpy(bits_at((np.arange(200) + 0.5) / 200))])
    assert case.possible[draw_at(row, rule, ends, **lists)[0].numpy()].all()
    if not clear:
        tokens, bits = thinned(most, *centres(case, 1e-9))
        tokens, bits = tokens[case.sure[tokens]], bits[case.sure[tokens]]
        cumulative, got = np.cumsum(case.probability), draw_at(row, rule, bits, **lists)[0].numpy()
        assert np.abs(cumulative[got] - cumulative[tokens]).max(initial=0) < 3e-5


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_sets_and_draws(rule, dtype):
    torch.manual_seed(1)
    for vocab in (1, 2, 3, 31, 64, 65, 257, 1023, 4099):
        check_row((torch.randn(vocab) * 3).to(dtype), rule)


@pytest.mark.parametrize("most", [500, *full(None)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_large_vocabulary(rule, most):
    torch.manual_seed(2)
    row = torch.randn(50257) * 4
    check_row(row, rule, most=most)


@pytest.mark.parametrize("most", [500, *full(None)])
@pytest.mark.parametrize("top_k", (80, 500, 1000, 6000, 6289, 49000))
def test_large_top_k(top_k, most):
    """Bounds from groups of the row, from their strands, and none."""
    torch.manual_seed(8)
    for spread in (0.01, 3.0):
        check_row(torch.randn(50319) * spread, Rule(top_k=top_k), most=most)


@pytest.mark.parametrize("rule", [r for r in RULES if r.temperature < 3], ids=str)
def test_ties_go_to_lower_ids(rule):
    torch.manual_seed(3)
    for vocab in (5, 130, 777):
        check_row(torch.randint(-3, 4, (vocab,)).float(), rule)
    row = torch.zeros(300)
    row[::2] = -0.0  # both zeros are equal
    check_row(row, rule)


def test_exact_count_among_equal_logits():
    row = torch.full((200,), 1.5)
    tokens, *_ = draw_at(row, Rule(top_k=10), bits_at((np.arange(1000) + 0.5) / 1000))
    assert torch.bincount(tokens, minlength=200).tolist() == [100] * 10 + [0] * 190
    tokens, *_ = draw_at(row, Rule(top_p=0.25), bits_at((np.arange(1000) + 0.5) / 1000))
    assert torch.bincount(tokens, minlength=200).tolist() == [20] * 50 + [0] * 150


@pytest.mark.parametrize("vocab", (151936, 262144, 2**20 - 1))
def test_largest_vocabularies(vocab):
    torch.manual_seed(4)
    row = torch.randn(vocab)
    tokens, _, filtered, valid = draw_at(row, Rule(), ALL_BITS)
    assert valid.all() and tokens[0] == 0 and tokens[-1] == vocab - 1
    np.testing.assert_allclose(filtered[0], row.log_softmax(0)[0], rtol=1e-5)
    flat = torch.zeros(vocab)  # the largest sum of weights
    assert (draw_at(flat, Rule(), ALL_BITS)[0] == torch.tensor([0, 0, (vocab - 1) // 2, vocab // 2, vocab - 1])).all()


def test_masked_entries_are_never_drawn():
    torch.manual_seed(5)
    row = torch.randn(1000)
    row[::3] = -torch.inf
    row[0] = row[999] = -torch.inf
    for rule in RULES:
        check_row(row, rule)
        tokens = draw_at(row, rule, torch.cat([ALL_BITS, torch.randint(-(2**63), 2**63 - 1, (500,))]))[0]
        assert row[tokens].isfinite().all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_finite_column(rule):
    row = torch.full((333,), -torch.inf)
    row[200] = -5.0
    tokens, logprob, filtered, valid = draw_at(row, rule, ALL_BITS)
    assert (tokens == 200).all() and (logprob == 0).all() and (filtered == 0).all() and valid.all()


@pytest.mark.parametrize("scale", (1e4, 1e30, 3e38))
def test_extreme_logits(scale):
    row = torch.tensor([-1.0, 1.0, 0.5, 1.0, 0.0]) * scale
    for rule in RULES[:3]:
        tokens, logprob, _, valid = draw_at(row, rule, ALL_BITS)
        assert valid.all() and set(tokens.tolist()) <= {1, 3}
        np.testing.assert_allclose(logprob, np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize("temperature", (1e-38, 1e-6, 1e6, 3e38))
def test_extreme_temperatures(temperature):
    row = torch.tensor([-1.0, 2.0, -torch.inf, 0.5])
    tokens, _, filtered, valid = draw_at(row, Rule(temperature), bits_at((np.arange(300) + 0.5) / 300))
    assert valid.all()
    assert set(tokens.tolist()) == ({1} if temperature < 1 else {0, 1, 3})
    np.testing.assert_allclose(filtered, 0 if temperature < 1 else -np.log(3), atol=1e-5)


def test_greedy():
    row = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-torch.inf, -9.0, -torch.inf, -9.0]])
    drawn = sample_tokens(row, temperature=0.0, top_k=2, top_p=0.1, min_p=0.5, seed=1, position=1)
    assert drawn.tokens.tolist() == [1, 0, 1] and drawn.valid.all()
    torch.testing.assert_close(drawn.logprobs, row.log_softmax(-1).gather(1, drawn.tokens[:, None])[:, 0])
    assert (drawn.filtered_logprobs == 0).all()


def test_rows_without_a_token_stay_alone():
    torch.manual_seed(6)
    logits = torch.randn(6, 700)
    clean = sample_tokens(logits, seed=torch.arange(6), position=0)
    logits[0] = -torch.inf
    logits[1, 699] = torch.nan
    logits[2, 0] = torch.inf
    logits[3] = torch.nan
    for options in (r.options() for r in (*RULES, Rule(temperature=0.0))):
        drawn = sample_tokens(logits, seed=torch.arange(6), position=0, **options)
        assert drawn.valid.tolist() == [False] * 4 + [True] * 2
        assert (drawn.tokens[:4] == 0).all() and drawn.logprobs[:4].isnan().all()
        assert drawn.filtered_logprobs[:4].isnan().all()
    drawn = sample_tokens(logits, seed=torch.arange(6), position=0)
    assert (drawn.tokens[4:] == clean.tokens[4:]).all() and (drawn.logprobs[4:] == clean.logprobs[4:]).all()


@pytest.mark.parametrize("name", ("temperature", "top_p", "min_p", "repetition_penalty", "top_k"))
def test_illegal_parameters_in_tensors_touch_their_own_row(name):
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    illegal = {"temperature": (-1, np.nan, np.inf), "top_p": (0, 1.5, np.nan), "min_p": (-0.1, 1.1, np.nan),
               "repetition_penalty": (0, -1, np.nan), "top_k": (-1, -(2**62), -5)}[name]  # fmt: skip
    legal = 3 if name == "top_k" else 0.5
    values = torch.tensor([*illegal, legal], dtype=torch.int64 if name == "top_k" else torch.float32)
    drawn = sample_tokens(logits, seed=0, position=0, **{name: values})
    assert drawn.valid.tolist() == [False, False, False, True]
    assert drawn.tokens[:3].tolist() == [0, 0, 0] and drawn.logprobs[:3].isnan().all()
    alone = sample_tokens(logits[3:], seed=0, position=0, **{name: legal})
    assert drawn.tokens[3] == alone.tokens[0]


@pytest.mark.parametrize("rule", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 10}, {"top_p": 0.9}])
def test_a_penalty_that_overflows_leaves_a_distribution(rule):
    logits = torch.randn(3, 1000)
    logits[:, 5] = 3e38
    found = sample_tokens(
        logits, seed=torch.arange(3), position=0, repetition_penalty=0.1, previous_tokens=torch.full((3, 1), 5), **rule
    )
    assert found.tokens.tolist() == [5, 5, 5] and found.valid.all()
    assert (found.logprobs == 0).all() and (found.filtered_logprobs == 0).all()


def test_repetition_penalty_and_banned_tokens():
    torch.manual_seed(7)
    row = torch.randn(500) * 3
    previous = torch.tensor([3, 3, 77, -1, 500, 10**12, 499, 3])
    banned = torch.rand(500) < 0.3
    for rule in RULES:
        for lists in (
            {"previous_tokens": previous},
            {"banned": banned},
            {"previous_tokens": previous, "banned": banned},
        ):
            z = adjusted(
                row.double().numpy(), float(np.float32(1.3)), lists.get("previous_tokens", []), lists.get("banned")
            )
            check_row(row, rule, z, repetition_penalty=1.3, **lists)


def test_everything_banned():
    logits = torch.randn(3, 50)
    drawn = sample_tokens(logits, seed=0, position=0, banned=torch.ones(50, dtype=torch.bool))
    assert not drawn.valid.any() and (drawn.tokens == 0).all()
    per_row = torch.zeros(3, 50, dtype=torch.bool)
    per_row[1] = True
    per_row[2, 1:] = True
    drawn = sample_tokens(logits, seed=0, position=0, banned=per_row)
    assert drawn.valid.tolist() == [True, False, True] and drawn.tokens[2] == 0


def test_no_rows():
    drawn = sample_tokens(torch.empty(0, 40), seed=torch.empty(0, dtype=torch.int64), position=0, top_k=3)
    assert drawn.tokens.shape == drawn.logprobs.shape == drawn.valid.shape == (0,)
