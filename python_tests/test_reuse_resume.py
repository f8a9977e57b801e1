"""Kept teacher logits in checkpoints, and over processes."""

import json
import signal

import pytest
import torch
from reuse_worker import RANK_JOBS, rank_trainer, reuse_trainer
from safetensors.torch import load_file
from trainer_worker import InterruptAfterStep, InterruptedRun
from trainer_world import logged, weights


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_same_store(found, expected):
    assert set(found.keys()) == set(expected.keys())
    for key in expected.keys():
        assert (found.get(key) == expected.get(key)).all()


RESUMED = [
    (dict(), 3),
    (dict(), 8),
    (dict(reuse_teacher_logits="sample"), 5),
    (dict(policy="dataset"), 5),
    (dict(policy="teacher_responses"), 5),
]


@pytest.mark.parametrize(("settings", "stop"), RESUMED)
def test_resume_gives_the_same_weights_and_asks_the_teacher_no_more(tmp_path, settings, stop):
    expected = reuse_trainer(tmp_path / "whole", max_steps=9, **settings)
    expected.train()
    interrupted = reuse_trainer(tmp_path / "parts", max_steps=9, **settings)
    interrupted.add_callback(InterruptAfterStep(stop))
    with pytest.raises(InterruptedRun):
        interrupted.train()
    torch.manual_seed(stop)
    resumed = reuse_trainer(tmp_path / "parts", max_steps=9, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(expected))
    for name in ("data", "replay"):
        assert_same_store(getattr(resumed.run.teaching.stores, name), getattr(expected.run.teaching.stores, name))
    for name in ("teacher_rows", "reused_rows", "loss"):
        assert logged(resumed, name) == logged(expected, name)


def test_kill_9_and_resume_gives_the_same_weights(tmp_path, forks):
    expected = reuse_trainer(tmp_path / "whole")
    expected.train()
    assert {"data", "fresh", "replay"} == set(logged(expected, "batch_source"))
    for options, code in ((["--kill-after-step", "7"], -signal.SIGKILL), (["--resume"], 0)):
        # Sums over rows depend on the number of threads in their last bits: as many as this process has.
        threads = torch.get_num_threads()
        done = forks.run("reuse_worker", "train", tmp_path / "killed", *options, threads=threads)
        assert done.codes == [code], done.output
    assert_same_weights(load_file(tmp_path / "killed" / "result.safetensors"), weights(expected))


def test_logits_compressed_in_another_way_are_computed_anew(tmp_path, caplog):
    reuse_trainer(tmp_path, max_steps=4, policy="dataset").train()
    other = reuse_trainer(tmp_path, max_steps=6, policy="dataset", reuse_k=4)
    other.train(resume_from_checkpoint=True)
    assert "compressed as this run does; they are computed again" in caplog.text
    assert sum(logged(other, "teacher_rows")[4:]) > 0


def test_a_checkpoint_without_kept_logits_can_be_gone_on_from(tmp_path):
    reuse_trainer(tmp_path, max_steps=4, reuse_teacher_logits="off").train()
    other = reuse_trainer(tmp_path, max_steps=8)
    other.train(resume_from_checkpoint=True)
    assert len(logged(other, "loss")) == 8 and len(other.run.teaching.stores.data) > 0


def test_a_run_without_reuse_goes_on_from_a_checkpoint_with_kept_logits(tmp_path):
    reuse_trainer(tmp_path, max_steps=4).train()
    other = reuse_trainer(tmp_path, max_steps=6, reuse_teacher_logits="off")
    other.train(resume_from_checkpoint=True)
    assert len(logged(other, "loss")) == 6


def test_replayed_records_are_dealt_out_with_their_sequences(tmp_path):
    trainer = reuse_trainer(tmp_path, max_steps=8, sgo_initial=1.0, replay_capacity=100)
    trainer.train()
    saved = [trainer.run.tensors()] * 2
    state = trainer.run.state()
    for rank in range(3):
        other = reuse_trainer(tmp_path / str(rank), max_steps=8, sgo_initial=1.0, replay_capacity=100)
        other.rollouts.unpack(saved, store_epoch=None, rank=rank, world=3)
        keys = [sequence.key for sequence in other.rollouts.buffer.sequences()]
        other.run.teaching.unpack(state["teaching"], saved, keys)
        assert set(other.run.teaching.stores.replay.keys()) == set(keys) and keys
        assert_same_store(other.run.teaching.stores.data, trainer.run.teaching.stores.data)


# ---- two processes


@pytest.fixture(scope="module")
def out(tmp_path_factory, forks):
    folder = tmp_path_factory.mktemp("ranks")
    done = forks.run("reuse_worker", "ranks", folder, processes=2)
    # Judged by the last file, not by the exit status: gloo may abort after all work is done.
    assert (folder / "last1.safetensors").is_file() and (folder / "last0.safetensors").is_file(), done.output[-4000:]
    return folder


def reports(out, job):
    return [json.loads((out / job / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def column(report, key):
    return [entry[key] for entry in report["log_history"] if key in entry]


@pytest.mark.parametrize("job", ["data", "sample"])
def test_two_processes_equal_one(out, tmp_path, job):
    single = rank_trainer(tmp_path, job, batch_size=4)
    single.train()
    for rank, report in enumerate(reports(out, job)):
        assert column(report, "loss") == pytest.approx(logged(single, "loss"), rel=1e-4)
        found = load_file(out / job / f"rank{rank}.safetensors")
        for name, value in weights(single).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_a_row_that_moves_to_another_process_does_not_meet_the_teacher_again(out):
    for report in reports(out, "data"):
        assert report["data"] == 16
        assert column(report, "teacher_rows")[:8] == [4.0] * 4 + [0.0] * 4  # rows of both processes


def test_processes_keep_their_own_replayed_sequences(out):
    first, second = reports(out, "adaptive")
    sources = column(first, "batch_source")
    assert sources == column(second, "batch_source") and {"data", "fresh", "replay"} == set(sources)
    assert all(n == 0 for n, source in zip(column(first, "teacher_rows"), sources, strict=False) if source == "replay")
    assert 0 < first["replay"] <= 8 and first["data"] == second["data"]
    assert column(first, "reuse_disk_mib")[-1] > 0
    one, other = (load_file(out / "adaptive" / f"rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)


def test_resume_over_processes_gives_the_same_weights(out):
    for rank in (0, 1):
        assert_same_weights(load_file(out / f"resumed{rank}.safetensors"), load_file(out / f"whole{rank}.safetensors"))


def test_every_job_ran(out):
    assert all((out / job / "rank1.json").is_file() for job in RANK_JOBS)
