"""Policies: which source a step gets."""

from collections import Counter

import pytest

from distillm_ext.data.draws import Stream, uniform
from distillm_ext.training.rollouts.policies import POLICIES, Decision, Source, StepContext, make_policy
from distillm_ext.training.rollouts.schedule import PaperSchedule, ReferenceSchedule


def context(draw, *, step=0, total=100, size=100, capacity=100, batch=4):
    return StepContext(
        step=step, total_steps=total, draw=draw, batch_size=batch, buffer_size=size, buffer_capacity=capacity
    )


def policy(name, schedule=None, fraction=0.5):
    return make_policy(name, mixed_fraction=fraction, schedule=schedule or PaperSchedule())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dataset", Source.DATA),
        ("on_policy", Source.FRESH),
        ("teacher_responses", Source.TEACHER),
        ("batched_on_policy", Source.EPOCH),
    ],
)
def test_policies_that_never_change(name, source):
    assert {policy(name).decide(context(draw)) for draw in (0.0, 0.5, 0.999)} == {Decision(source)}


def test_mixed_takes_its_fraction():
    sources = Counter(policy("mixed", fraction=0.3).decide(context(i / 100)).source for i in range(100))
    assert sources == {Source.FRESH: 30, Source.DATA: 70}


@pytest.mark.parametrize("phi", [0.0, 1.0])
def test_extremes_of_phi(phi):
    sources = {
        policy("adaptive_off_policy", PaperSchedule(phi=phi)).decide(context(i / 100)).source for i in range(100)
    }
    assert sources == ({Source.DATA} if phi == 0 else {Source.FRESH})


def test_one_draw_splits_into_generate_replay_data():
    adaptive = policy("adaptive_off_policy", PaperSchedule(phi=0.6))
    decisions = [adaptive.decide(context(i / 100, step=50)) for i in range(100)]
    # u < φ(1 − t/T) = 0.3 generates, u < φ = 0.6 replays, the rest is data.
    assert Counter(decision.source for decision in decisions) == {Source.FRESH: 30, Source.REPLAY: 30, Source.DATA: 40}
    assert decisions[30].source is Source.REPLAY and decisions[60].source is Source.DATA


def test_batch_after_a_generation():
    paper = policy("adaptive_off_policy", PaperSchedule(phi=1.0)).decide(context(0.0))
    reference = policy("adaptive_off_policy", ReferenceSchedule(phi=1.0)).decide(context(0.0))
    assert paper == Decision(Source.FRESH, store=True, draw_from_buffer=True)
    assert reference == Decision(Source.FRESH, store=True, draw_from_buffer=False)


@pytest.mark.parametrize(
    ("schedule", "size", "source"),
    [
        (PaperSchedule(phi=0.6), 3, Source.FRESH),
        (PaperSchedule(phi=0.6), 4, Source.REPLAY),
        (ReferenceSchedule(phi=0.6), 99, Source.FRESH),
        (ReferenceSchedule(phi=0.6), 100, Source.REPLAY),
    ],
)
def test_filling_the_buffer(schedule, size, source):
    late = context(0.5, step=99, size=size)  # at the end of a run the decreasing ratio no longer generates
    assert policy("adaptive_off_policy", schedule).decide(late).source is source


def test_state_survives_a_round_trip():
    adaptive = policy("adaptive_off_policy", PaperSchedule(phi=0.3))
    for loss in (1.0, 2.0):
        adaptive.observe(loss, begun=True)
    copy = policy("adaptive_off_policy", PaperSchedule())
    copy.load_state_dict(adaptive.state_dict())
    assert (copy.schedule.phi, copy.schedule.reference_loss) == (adaptive.schedule.phi, 2.0)
    assert copy.metrics() == {"phi": pytest.approx(0.4)}


def test_validations_during_a_warm_up_do_not_raise_phi():
    adaptive = policy("adaptive_off_policy")
    for loss in (1.0, 9.0):
        adaptive.observe(loss, begun=False)
    assert adaptive.metrics() == {"phi": 0.0} and adaptive.schedule.reference_loss == 9.0


def test_frequencies_over_a_run_follow_phi():
    adaptive = policy("adaptive_off_policy", PaperSchedule(phi=0.5))
    steps = 4000
    sources = Counter(
        adaptive.decide(context(uniform(0, Stream.SOURCE, step), step=step, total=steps)).source
        for step in range(steps)
    )
    assert sources[Source.DATA] / steps == pytest.approx(0.5, abs=0.03)
    assert sources[Source.FRESH] / steps == pytest.approx(0.25, abs=0.03)


def test_unknown_name_lists_the_legal_ones():
    with pytest.raises(ValueError, match="adaptive_off_policy"):
        policy("offline")
    assert all(policy(name) for name in POLICIES)
