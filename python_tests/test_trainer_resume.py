"""Checkpoints: a run that is killed at any moment resumes to the same weights, bit for bit."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from trainer_worker import InterruptAfterStep, InterruptedRun, job_trainer
from trainer_world import adaptive, logged, tiny_config, tiny_trainer, weights

from distillm_ext.training import newest_complete_checkpoint
from distillm_ext.training.checkpoints import folders as checkpoint
from distillm_ext.training.checkpoints import resumable


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def folders(out):
    return [path.name for path in checkpoint.list_checkpoints(out)]


# ---- killed


def test_kill_9_twice_and_resume_gives_the_same_weights(tmp_path, forks):
    def run(*options):
        # Sums over rows depend on the number of threads in their last bits: as many as this process has.
        done = forks.run("trainer_worker", "train", out, *options, threads=torch.get_num_threads())
        return done.codes, done.output

    expected = job_trainer(tmp_path / "whole")
    expected.train()
    sources = logged(expected, "batch_source")
    assert set(sources[:5]) & {"fresh", "replay"} and {"data", "fresh", "replay"} == set(sources)

    out = tmp_path / "killed"
    codes, output = run("--kill-after-step", "5")
    assert codes == [-signal.SIGKILL], output
    assert folders(out) == ["checkpoint-2", "checkpoint-4"]
    codes, output = run("--resume", "--kill-in-save", "8")
    assert codes == [-signal.SIGKILL], output
    # The folder of step 8 has all of transformers' files and would be resumed from by its number.
    assert (out / "checkpoint-8" / "model.safetensors").is_file()
    assert newest_complete_checkpoint(out) == str(out / "checkpoint-6")
    codes, output = run("--resume")
    assert codes == [0], output

    assert_same_weights(load_file(out / "result.safetensors"), weights(expected))
    history = json.loads((out / "result.json").read_text())["log_history"]
    assert [entry["batch_source"] for entry in history if "batch_source" in entry] == sources
    assert [entry["phi"] for entry in history if "phi" in entry] == logged(expected, "phi")
    assert folders(out) == ["checkpoint-10", "checkpoint-12"]


# ---- interrupted in the same process: cheap enough for every policy


RESUMED = [
    (dict(schedule="paper"), 3),
    (dict(schedule="paper"), 8),
    (dict(schedule="reference"), 5),
    (dict(policy="mixed"), 5),
    (dict(policy="teacher_responses"), 5),
    (dict(policy="batched_on_policy"), 3),
    (dict(policy="dataset", warmup_objective="sft", warmup_objective_steps=4), 3),
]


@pytest.mark.parametrize(("settings", "stop"), RESUMED)
def test_resume_gives_the_same_weights(tmp_path, settings, stop):
    expected = job_trainer(tmp_path / "whole", max_steps=9, **settings)
    expected.train()
    interrupted = job_trainer(tmp_path / "parts", max_steps=9, **settings)
    interrupted.add_callback(InterruptAfterStep(stop))
    with pytest.raises(InterruptedRun):
        interrupted.train()
    torch.manual_seed(stop)
    resumed = job_trainer(tmp_path / "parts", max_steps=9, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(expected))
    assert resumed.run.policy.state_dict() == expected.run.policy.state_dict()
    for mine, theirs in zip(resumed.rollouts.buffer.sequences(), expected.rollouts.buffer.sequences(), strict=True):
        assert mine.row == theirs.row and (mine.input_ids == theirs.input_ids).all()


def test_a_resumed_run_does_not_validate_on_start_again(tmp_path):
    settings = dict(schedule="reference", max_steps=4, save_steps=2)
    job_trainer(tmp_path, **settings).train()
    resumed = job_trainer(tmp_path, **(settings | dict(max_steps=6)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    validations = [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry]
    assert validations == [0, 3, 6]


def test_training_again_without_resume_starts_anew(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, max_steps=6, **adaptive(sgo_initial=1.0, eval_steps=100)))
    trainer.train()
    first = [(s.row, s.input_ids.tolist()) for s in trainer.rollouts.buffer.sequences()]
    trainer.train()
    assert len(trainer.rollouts.buffer) == len(first)


# ---- choosing and keeping checkpoints


def make_checkpoint(root, step, *, complete=True, is_resumable=True):
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    if complete:
        checkpoint.mark_complete(folder, step=step, resumable=is_resumable)
    return folder


def test_newest_complete_by_number_not_by_name_or_time(tmp_path):
    for step, complete in ((10, True), (9, True), (100, False), (2, True)):
        make_checkpoint(tmp_path, step, complete=complete)
    make_checkpoint(tmp_path, 11, is_resumable=False)
    (tmp_path / "checkpoint-last").mkdir()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [2, 4, 5, 6, 8, 9]),
        (0, None, [2, 4, 5, 6, 8, 9]),
        (1, None, [8, 9]),
        (2, None, [6, 8, 9]),
        (1, 4, [4, 8, 9]),
        (3, 2, [2, 6, 8, 9]),
    ],
)
def test_rotation(tmp_path, limit, keep, left):
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 5, complete=False)
    make_checkpoint(tmp_path, 9, complete=False)  # newer than the newest complete one: perhaps being written
    checkpoint.rotate(tmp_path, limit=limit, keep=[keep and tmp_path / f"checkpoint-{keep}"])
    assert folders(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_a_limit_of_one_never_leaves_the_run_without_a_complete_checkpoint(tmp_path, monkeypatch):
    complete, before = checkpoint.mark_complete, []

    def watch(folder, **options):
        before.append(newest_complete_checkpoint(tmp_path))
        complete(folder, **options)

    monkeypatch.setattr(resumable, "mark_complete", watch)
    tiny_trainer(tiny_config(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)).train()
    assert before == [None, *(str(tmp_path / f"checkpoint-{step}") for step in (1, 2, 3))]
    assert folders(tmp_path) == ["checkpoint-4"]


def test_a_checkpoint_killed_while_it_is_deleted_is_not_complete(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path, 2)

    def killed(path):
        raise InterruptedRun

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(InterruptedRun):
        checkpoint.remove_checkpoint(folder)
    assert folder.is_dir() and newest_complete_checkpoint(tmp_path) is None


def test_resume_without_a_complete_checkpoint_says_so(tmp_path):
    make_checkpoint(tmp_path, 3, complete=False)
    trainer = tiny_trainer(tiny_config(tmp_path))
    with pytest.raises(ValueError, match="no complete checkpoint in .*unfinished: checkpoint-3"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_weights_only_checkpoints_are_not_resumed_from(tmp_path):
    tiny_trainer(tiny_config(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)).train()
    assert checkpoint.is_complete(tmp_path / "checkpoint-4") and newest_complete_checkpoint(tmp_path) is None


def test_damaged_state_is_refused(tmp_path):
    job_trainer(tmp_path, max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    state = folder / checkpoint.STATE_FILE
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        checkpoint.load_state(folder)
    state.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        checkpoint.load_state(folder)
    state.write_text(json.dumps({**content, "world_size": 2}))
    with pytest.raises(ValueError, match="sequences-00000-of-00002.safetensors is missing"):
        checkpoint.load_state(folder)


def test_buffers_are_dealt_out_again_to_another_number_of_processes(tmp_path):
    trainer = job_trainer(tmp_path, max_steps=8, eval_steps=100, replay_capacity=100, sgo_initial=1.0)
    trainer.train()
    rows = [s.row for s in trainer.rollouts.buffer.sequences()]
    saved = [trainer.rollouts.pack()] * 2
    found = []
    for rank in range(3):
        trainer.rollouts.unpack(saved, store_epoch=None, rank=rank, world=3)
        found.append([s.row for s in trainer.rollouts.buffer.sequences()])
    assert found == [(rows * 2)[rank::3] for rank in range(3)]


def test_another_policy_starts_anew(tmp_path, caplog):
    job_trainer(tmp_path, max_steps=4).train()
    other = job_trainer(tmp_path, max_steps=6, policy="dataset")
    other.train(resume_from_checkpoint=True)
    assert "'dataset' starts anew" in caplog.text and len(other.rollouts.buffer) == 0
