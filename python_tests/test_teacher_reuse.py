"""The teacher runs once per sequence: which rows meet it, what the losses are, how much memory is taken."""

import warnings

import numpy as np
import pytest
import torch
from trainer_world import (
    adaptive,
    logged,
    tiny_config,
    tiny_model,
    tiny_trainer,
    weights,
)


def counted(trainer):
    """Rows that meet the teacher, per optimizer step and in evaluation (step -1)."""
    seen, forward = [], trainer.teacher.reader.hidden

    def hidden(batch):
        step = trainer.state.global_step if trainer.model.training else -1
        seen.append((step, len(batch.input_ids)))
        return forward(batch)

    trainer.teacher.reader.hidden = hidden
    return seen


def rows_by_step(seen, steps):
    return [sum(count for step, count in seen if step == wanted) for wanted in range(steps)]


def reusing(tmp_path, method="topk", **settings):
    rows = settings.pop("rows", 16)
    return tiny_trainer(tiny_config(tmp_path, reuse_teacher_logits=method, **settings), rows=rows)


# ---- which rows meet the teacher


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_from_the_second_epoch_on_no_data_row_meets_the_teacher(tmp_path, method):
    trainer = reusing(tmp_path, method, max_steps=10)
    seen = counted(trainer)
    trainer.train()
    assert rows_by_step(seen, 10) == [4, 4, 4, 4, 0, 0, 0, 0, 0, 0]
    assert logged(trainer, "teacher_rows") == [4.0] * 4 + [0.0] * 6
    assert logged(trainer, "reused_rows") == [0.0] * 4 + [4.0] * 6


def test_the_teacher_runs_in_every_step_without_reuse(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, max_steps=6))
    seen = counted(trainer)
    trainer.train()
    assert rows_by_step(seen, 6) == [4] * 6 and not logged(trainer, "teacher_rows")


@pytest.mark.parametrize(("schedule", "accumulated"), [("paper", 1), ("reference", 1), ("paper", 2)])
def test_a_replayed_batch_does_no_teacher_forward(tmp_path, schedule, accumulated):
    settings = adaptive(schedule=schedule, sgo_initial=0.9, replay_capacity=8, max_steps=16, eval_steps=100)
    settings |= dict(gradient_accumulation_steps=accumulated, per_device_train_batch_size=4 // accumulated)
    trainer = reusing(tmp_path, **settings)
    seen = counted(trainer)
    trainer.train()
    sources, counts = logged(trainer, "batch_source"), rows_by_step(seen, 16)
    assert sources.count("replay") >= 3 and sources.count("fresh") >= 2
    assert all(count == 0 for source, count in zip(sources, counts, strict=True) if source == "replay")
    # A generated sequence meets it when it enters the buffer, and not again where an equal one is there.
    fresh = [count for source, count in zip(sources, counts, strict=True) if source == "fresh"]
    assert max(fresh) > 0 and all(count <= 4 for count in fresh)


def test_the_replay_buffer_keeps_only_what_it_holds(tmp_path):
    settings = adaptive(sgo_initial=1.0, replay_ratio="constant", replay_capacity=6, max_steps=12, eval_steps=100)
    trainer = reusing(tmp_path, **settings)
    trainer.train()
    keys = {sequence.key for sequence in trainer.rollouts.buffer.sequences()}
    assert set(trainer.run.teaching.stores.replay.keys()) == keys and len(keys) > 3


def test_a_mixed_batch_asks_for_the_missing_rows_alone(tmp_path):
    trainer = reusing(tmp_path)
    rows = [dict(row) for row in trainer.train_dataset]
    seen = counted(trainer)
    trainer.model.train()
    teaching, collate = trainer.run.teaching, trainer.data_collator
    whole = teaching.targets(collate(rows[:6]))
    teaching.begin_step("data", [collate([rows[1], rows[4]])], reusable=True)
    teaching.targets(collate([rows[1], rows[4]]))
    teaching.settle()
    del seen[:]
    mixed = teaching.targets(collate(rows[:6]))
    assert [count for _, count in seen] == [4]
    assert torch.equal(mixed.ids, whole.ids)
    torch.testing.assert_close(mixed.logprobs, whole.logprobs, rtol=0, atol=0.2)  # a step of the codec
    del seen[:]
    teaching.targets(collate([rows[4], rows[1], rows[4]]))
    assert seen == []


def test_fresh_responses_that_are_not_kept_meet_the_teacher_each_time(tmp_path):
    trainer = reusing(tmp_path, policy="on_policy", max_steps=6)
    seen = counted(trainer)
    trainer.train()
    assert rows_by_step(seen, 6) == [4] * 6
    assert logged(trainer, "reuse_disk_mib")[-1] == 0.0


def test_the_teachers_own_responses_are_kept(tmp_path):
    trainer = reusing(tmp_path, policy="teacher_responses", max_steps=8)
    trainer.train()
    assert logged(trainer, "teacher_rows") == [4.0] * 4 + [0.0] * 4


def test_validation_uses_the_teacher_itself(tmp_path):
    settings = dict(max_steps=4, eval_strategy="steps", eval_steps=4)
    dense = tiny_trainer(tiny_config(tmp_path / "a", learning_rate=0.0, **settings))
    dense.train()
    reuse = reusing(tmp_path / "b", learning_rate=0.0, reuse_k=2, **settings)
    seen = counted(reuse)
    reuse.train()
    assert sum(count for step, count in seen if step == -1) == 6
    assert logged(reuse, "eval_divergence") == pytest.approx(logged(dense, "eval_divergence"), rel=1e-6)


# ---- the loss


@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl", "forward_kl", "generalized_js"])
def test_with_all_entries_kept_the_run_is_the_dense_one(tmp_path, divergence):
    settings = adaptive(divergence=divergence, max_steps=8, ce_weight=0.3, temperature=2.0)
    settings |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    dense = tiny_trainer(tiny_config(tmp_path / "a", **settings))
    dense.train()
    reuse = reusing(tmp_path / "b", reuse_codec="exact", reuse_k=64, **settings)
    reuse.train()
    assert {"data", "fresh", "replay"} == set(logged(reuse, "batch_source"))
    for name in ("loss", "loss_divergence", "loss_ce"):
        assert logged(reuse, name) == pytest.approx(logged(dense, name), rel=1e-3, abs=1e-4)
    for name, value in weights(dense).items():
        torch.testing.assert_close(weights(reuse)[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_the_objective_does_not_depend_on_where_the_logits_come_from(tmp_path, method):
    """A student that stands still has the same losses in the first epoch, which computes, and in the second."""
    trainer = reusing(tmp_path, method, max_steps=8, learning_rate=0.0, reuse_k=8, rows=4)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] > 0.05 and losses == pytest.approx([losses[0]] * 8, rel=1e-6)


def test_sampled_logits_depend_on_the_sequence_and_the_seed_alone(tmp_path):
    trainer, other = reusing(tmp_path, "sample", reuse_k=8), reusing(tmp_path, "sample", reuse_k=8, seed=8)
    rows, collate = [dict(row) for row in trainer.train_dataset], trainer.data_collator
    alone = trainer.run.teaching.targets(collate([rows[3]]))
    batch = collate([rows[0], rows[3], rows[5]])
    start = batch["row_targets"][0]
    there = trainer.run.teaching.targets(batch)[start : start + batch["row_targets"][1]]
    assert torch.equal(alone.counts, there.counts) and torch.equal(alone.ids, there.ids)
    assert not torch.equal(alone.counts, other.run.teaching.targets(collate([rows[3]])).counts)


def test_a_warm_up_reads_the_teacher_at_its_own_temperature(tmp_path):
    settings = dict(temperature=2.0, warmup_objective="forward_kl", warmup_objective_steps=3, max_steps=6)
    dense = tiny_trainer(tiny_config(tmp_path / "a", **settings))
    dense.train()
    reuse = reusing(tmp_path / "b", reuse_codec="exact", **settings)
    assert reuse.run.compression.temperatures == (1.0, 2.0)
    reuse.train()
    assert logged(reuse, "loss") == pytest.approx(logged(dense, "loss"), rel=1e-3)


def test_models_of_different_vocabulary(tmp_path):
    args = tiny_config(tmp_path, reuse_teacher_logits="topk", max_steps=3)
    trainer = tiny_trainer(args, model=tiny_model(1, vocab=72), teacher=tiny_model(2, layers=2, vocab=80))
    assert trainer.run.compression.vocab_size == 64
    trainer.train()
    assert all(np.isfinite(logged(trainer, "loss")))


# ---- memory


def test_what_is_held_is_logged_and_no_file_is_seen(tmp_path):
    trainer = reusing(tmp_path, **adaptive(max_steps=10, replay_capacity=12))
    trainer.train()
    stores = trainer.run.teaching.stores
    held = sum(len(store.get(key)) for store in (stores.data, stores.replay) for key in store.keys())
    mib = held * trainer.run.compression.record_bytes / 2**20
    assert logged(trainer, "reuse_disk_mib")[-2:] == pytest.approx([mib, mib])  # at the end of the run too
    assert len(stores.data) and len(stores.replay) and not [path for path in tmp_path.iterdir() if path.is_file()]


def test_the_old_limit_of_memory_is_taken_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="reuse_memory_mib: not used any more.*in output_dir"):
        args = tiny_config(tmp_path, reuse_memory_mib=64)
    assert args.reuse_memory_mib == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        tiny_config(tmp_path)


# ---- bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reuse_teacher_logits="all"), "reuse_teacher_logits: expected one of off, topk, sample"),
        (dict(divergence="alpha_beta"), "divergence: 'alpha_beta' needs all of the teacher's logits"),
        (dict(tail="sampled"), "tail: 'sampled' weighs entries by how often they were drawn"),
        (dict(tail="rest"), "tail: expected one of bucket"),
        (dict(reuse_teacher_logits="sample", divergence="reverse_kl"), "'reverse_kl' has no unbiased form"),
        (dict(reuse_teacher_logits="sample", temperature=2.0), "temperature: must be 1 with sampled"),
        (dict(reuse_teacher_logits="sample", divergence="skew_reverse_kl", alpha=0.0), "with alpha 0"),
        (dict(reuse_k=0), "reuse_k: expected an int >= 1"),
        (dict(reuse_k=5000), r"reuse_k: expected an int in \[1, 4096\], got 5000"),
        (dict(reuse_codec="q5"), "reuse_codec: expected one of q4"),
    ],
)
def test_settings_without_a_form_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **(dict(reuse_teacher_logits="topk") | settings))


def test_sampled_logits_can_be_read_with_a_bucket(tmp_path):
    trainer = reusing(tmp_path, "sample", tail="bucket", divergence="reverse_kl", temperature=2.0, max_steps=2)
    trainer.train()
    assert all(np.isfinite(logged(trainer, "loss")))


def test_a_tail_without_compressed_logits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tail: says how compressed teacher logits are read"):
        tiny_trainer(tiny_config(tmp_path, tail="bucket"))
