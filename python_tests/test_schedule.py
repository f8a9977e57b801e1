"""Both rules for φ, point by point of the table in the method's description; counter-based draws."""

import math

import numpy as np
import pytest

from distillm_ext.data.draws import Stream, derive_seed, generator, uniform
from distillm_ext.training.rollouts.schedule import SCHEDULES, PaperSchedule, ReferenceSchedule


@pytest.mark.parametrize("rule", SCHEDULES.values())
def test_first_validation_only_sets_the_reference(rule):
    schedule = rule(phi=0.2)
    assert not schedule.observe(9.0)
    assert (schedule.phi, schedule.reference_loss) == (0.2, 9.0)


def test_paper_compares_with_the_previous_validation():
    schedule = PaperSchedule()
    rose = [schedule.observe(loss) for loss in (2.0, 1.5, 1.625, 1.5, 1.61)]
    # 1.625 > 1.5 + 0.1 rises; 1.61 > 1.5 + 0.1 rises again, though it is below the loss before training.
    assert rose == [False, False, True, False, True]
    assert schedule.phi == pytest.approx(0.2)
    assert schedule.reference_loss == 1.61


def test_reference_compares_with_the_last_increase():
    schedule = ReferenceSchedule(threshold=0.25)
    rose = [schedule.observe(loss) for loss in (2.0, 1.5, 2.0, 2.25, 2.375, 1.0, 2.5)]
    # The reference stays at 2.0 until a loss reaches 2.25, and is that loss until one reaches 2.5.
    assert rose == [False, False, False, True, False, False, True]
    assert schedule.reference_loss == 2.5 and schedule.phi == pytest.approx(0.2)


@pytest.mark.parametrize(("rule", "expected"), [(PaperSchedule, False), (ReferenceSchedule, True)])
def test_exactly_at_the_threshold(rule, expected):
    schedule = rule(threshold=0.25)
    schedule.observe(1.0)
    assert schedule.observe(1.25) is expected


@pytest.mark.parametrize("rule", SCHEDULES.values())
def test_phi_is_capped_at_one(rule):
    schedule = rule(phi=0.95, increment=0.1)
    for loss in (1.0, 2.0, 3.0, 4.0):
        schedule.observe(loss)
    assert schedule.phi == 1.0


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_compares_with_nothing_is_an_error(loss):
    schedule = PaperSchedule()
    schedule.observe(1.0)
    with pytest.raises(FloatingPointError, match="the validation loss is (inf|nan)"):
        schedule.observe(loss)
    assert schedule.reference_loss == 1.0


def test_rebase_never_raises_phi():
    schedule = PaperSchedule()
    schedule.observe(1.0)
    schedule.rebase(5.0)
    assert (schedule.phi, schedule.reference_loss) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [("decreasing", (0.5, 0.375, 0.05)), ("constant", (0.25, 0.25, 0.25)), ("increasing", (0.0, 0.125, 0.45))],
)
def test_share_of_generating_steps(ratio, expected):
    schedule = PaperSchedule(phi=0.5, replay_ratio=ratio)
    assert [schedule.generation_probability(step, 100) for step in (0, 25, 90)] == pytest.approx(expected)


def test_when_generation_is_forced():
    paper, reference = PaperSchedule(), ReferenceSchedule()
    assert paper.must_generate(3, 10, 4) and not paper.must_generate(4, 10, 4)
    assert reference.must_generate(9, 10, 4) and not reference.must_generate(10, 10, 4)


def test_draws_are_functions_of_seed_stream_and_counters():
    base = uniform(3, Stream.SOURCE, 5)
    assert uniform(3, Stream.SOURCE, 5) == base
    others = {uniform(4, Stream.SOURCE, 5), uniform(3, Stream.REPLAY, 5), uniform(3, Stream.SOURCE, 6)}
    assert base not in others and len(others) == 3
    assert derive_seed(3, Stream.REPLAY, 1, 2) != derive_seed(3, Stream.REPLAY, 2, 1)


def test_draws_ignore_and_leave_alone_the_global_generator():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = uniform(-1, Stream.SOURCE, 0)
    np.random.seed(99)
    assert uniform(-1, Stream.SOURCE, 0) == first
    np.random.seed(0)
    assert (np.random.get_state()[1] == before).all()


def test_every_bit_of_a_seed_counts():
    assert len({uniform(seed, Stream.SOURCE, -1) for seed in (-1, -2, 2**63, 2**63 + 1, 2**63 - 1)}) == 5


def test_draws_are_uniform_and_independent_between_steps():
    draws = np.array([uniform(0, Stream.SOURCE, step) for step in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02 and abs(draws.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


def test_too_many_counters():
    with pytest.raises(ValueError, match="at most 3"):
        generator(0, Stream.SOURCE, 1, 2, 3, 4)
