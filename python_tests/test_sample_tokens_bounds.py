"""`sample_tokens` where a comparison decides: draws on the bound between two tokens, masses that meet a threshold
exactly, the first and the last id.

Equal logits, and logits of whole octaves at T = log2(e), have masses that are exact powers of 2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_sample_tokens import RULES, Rule, draw_at

from distillm_ext import sample_tokens

OCTAVES = float(np.float32(math.log2(math.e)))  # the temperature at which a logit of -1 halves the mass


def at_parts(count: int, offset: int = 0) -> np.ndarray:
    """The bits that fall on the lower bound of each of `count` equal shares, a power of 2, or beside it."""
    step = 2**64 // count
    return np.array([(k * step + offset) % 2**64 for k in range(count)], np.uint64).view(np.int64)


def evenly(count: int) -> np.ndarray:
    return at_parts(count, 2**63 // count)


@pytest.mark.parametrize("rule,kept", [(Rule(), 1024), (Rule(top_k=512), 512), (Rule(top_p=0.25), 256)], ids=str)
def test_a_share_includes_its_lower_bound_alone(rule, kept):
    row = torch.zeros(1024)
    assert draw_at(row, rule, at_parts(kept))[0].tolist() == list(range(kept))
    assert draw_at(row, rule, at_parts(kept, -1))[0].tolist() == [kept - 1, *range(kept - 1)]


@pytest.mark.parametrize("min_p,kept", [(0.25, 3), (0.2500001, 2), (0.125, 4), (1.0, 1)])
def test_min_p_keeps_what_meets_it(min_p, kept):
    row = -torch.arange(8.0)
    for top_k in (0, 7):
        tokens = draw_at(row, Rule(OCTAVES, top_k, 1.0, min_p), evenly(256))[0]
        assert set(tokens.tolist()) == set(range(kept))


@pytest.mark.parametrize("top_p,kept", [(0.5, 1), (0.5000001, 2), (0.75, 2), (0.875, 3), (0.8750001, 4)])
def test_top_p_stops_where_it_is_met(top_p, kept):
    """Shares 1/2, 1/4, 1/8, ... and the last one twice, so that they add up to 1."""
    row = -torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 7])
    for top_k, order in ((0, range(8)), (0, range(7, -1, -1)), (8, range(8))):
        place = torch.tensor(list(order))
        tokens = draw_at(row[place], Rule(OCTAVES, top_k, top_p), evenly(1024))[0]
        assert set(place[tokens].tolist()) == set(range(kept))


def test_the_last_unit_of_mass():
    """44 octaves down one unit is left: the highest draw falls on it, and it decides what is half of the mass."""
    row = torch.tensor([0.0, 0.0, -44.0, -60.0])
    assert draw_at(row, Rule(OCTAVES, 3), [-1, -(2**63)])[0].tolist() == [2, 1]
    assert draw_at(row, Rule(OCTAVES), [-1, -(2**63)])[0].tolist() == [2, 1]
    for top_k in (0, 3):
        assert set(draw_at(row, Rule(OCTAVES, top_k, 0.5), evenly(64))[0].tolist()) == {0, 1}


@pytest.mark.parametrize("top_p", (1e-12, 1e-30))
def test_the_smallest_top_p_keeps_one(top_p):
    row = torch.zeros(300)
    row[[70, 200]] = 1.0
    for top_k in (0, 5):
        assert draw_at(row, Rule(1.0, top_k, top_p), evenly(8))[0].tolist() == [70] * 8


def test_greedy_ties_go_to_the_lowest_id_of_the_row():
    for ids in ([3, 60], [60, 70], [64, 700], [5, 128, 776], [776]):
        row = torch.zeros(1, 777)
        row[0, ids] = 2.0
        assert sample_tokens(row, temperature=0.0, seed=0, position=0).tokens.item() == ids[0]


@pytest.mark.parametrize("rule", RULES + [Rule(temperature=0.0)], ids=str)
def test_everything_banned_under_every_rule(rule):
    banned = torch.ones(2, 300, dtype=torch.bool)
    banned[1, 299] = False
    drawn = sample_tokens(torch.randn(2, 300), banned=banned, seed=0, position=0, **rule.options())
    assert drawn.valid.tolist() == [False, True] and drawn.tokens.tolist() == [0, 299]
    assert drawn.logprobs[0].isnan() and drawn.filtered_logprobs[0].isnan() and drawn.filtered_logprobs[1] == 0


@pytest.mark.parametrize("vocab", (3, 64, 65, 128, 777))
def test_first_and_last_id(vocab):
    """Both can be drawn, kept, penalised and banned."""
    for chosen in (0, vocab - 1):
        row = torch.full((1, vocab), 20.0)
        row[0, chosen] = 40.0
        only = torch.arange(vocab) == chosen
        for options in ({}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.9}, {"temperature": 0.0}):
            rule = {"seed": 0, "position": 0, **options}
            previous = {"previous_tokens": torch.tensor([[chosen]]), "repetition_penalty": 1e4}
            assert sample_tokens(row, **rule).tokens.item() == chosen
            assert sample_tokens(row, **previous, **rule).tokens.item() != chosen
            assert sample_tokens(row, banned=only, **rule).tokens.item() != chosen
            assert sample_tokens(-row, banned=~only, **rule).tokens.item() == chosen


def test_every_part_of_seed_and_position_counts():
    row = torch.zeros(1, 1 << 19)
    steps = (0, 1, 1 << 31, 1 << 32, 1 << 62, -1)
    assert len({sample_tokens(row, seed=step, position=0).tokens.item() for step in steps}) == len(steps)
    assert len({sample_tokens(row, seed=0, position=step).tokens.item() for step in steps}) == len(steps)


def test_subnormal_temperatures_draw_the_maximum():
    row = torch.tensor([[0.0, 3.0, 2.0, -torch.inf]])
    drawn = sample_tokens(row, temperature=torch.tensor([1e-44]), seed=0, position=0)
    assert drawn.valid.all() and drawn.tokens.item() == 1 and drawn.filtered_logprobs.item() == 0
