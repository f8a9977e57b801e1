"""Time sections and running sums of a training run."""

import pytest
import torch

from distillm_ext.training import meters
from distillm_ext.training.meters import Meters, StepClock

CPU = torch.device("cpu")


class FakeTime:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(meters, "time", fake)
    return fake


def test_inner_sections_are_taken_off_the_outer_one(time):
    clock = StepClock(CPU)
    with clock.section("student"):
        time.now += 2
        with clock.section("teacher"):
            time.now += 3
        with clock.section("loss"):
            time.now += 1
    time.now += 4
    seconds, wall = clock.report()
    assert seconds == {"student": 2, "teacher": 3, "loss": 1} and wall == 10


def test_excluded_time_counts_for_nothing_and_a_report_starts_anew(time):
    clock = StepClock(CPU)
    time.now += 1
    with clock.section("excluded"):
        time.now += 100
    assert clock.report() == ({}, 1)
    time.now += 5
    assert clock.report() == ({}, 5)


def test_a_section_ends_with_its_error(time):
    clock = StepClock(CPU)
    with pytest.raises(KeyError), clock.section("loss"):
        time.now += 1
        raise KeyError
    with clock.section("teacher"):
        time.now += 2
    assert clock.report() == ({"loss": 1, "teacher": 2}, 3)


def two_ranks(values):
    """What a gather of this rank and of one with the same values gives."""
    return torch.stack([values, values])


def test_report_is_per_step_over_all_ranks(time):
    gauges = Meters(CPU)
    time.now += 50  # set-up
    gauges.begin()
    for step, source in enumerate(("data", "fresh", "data")):
        gauges.begin()
        gauges.start_step(source, tokens=10)
        for _ in range(2):  # two micro-batches
            gauges.add_losses(step, {"total": torch.tensor(0.5), **({"ce": torch.tensor(1.0)} if step == 0 else {})})
    with gauges.clock.section("student"):
        time.now += 2
    report = gauges.report(two_ranks, replay_size=4)
    # The cross-entropy was there in one step only, and is the mean over that one.
    assert report["loss"] == pytest.approx(1.0) and report["loss_ce"] == pytest.approx(2.0)
    assert (report["batches_data"], report["batches_fresh"], report["batches_replay"]) == (2, 1, 0)
    assert report["replay_size"] == 8 and report["tokens_per_second"] == pytest.approx(2 * 30 / 2)
    assert (report["time_student"], report["time_other"]) == (1.0, 0.0)
    assert gauges.last_source == "data"
    time.now += 1
    assert gauges.report(two_ranks, replay_size=0) == {
        "batches_data": 0, "batches_fresh": 0, "batches_replay": 0, "replay_size": 0, "tokens_per_second": 0.0,
        "time_generation": 0.0, "time_teacher": 0.0, "time_student": 0.0, "time_loss": 0.0, "time_other": 1.0,
    }  # fmt: skip
