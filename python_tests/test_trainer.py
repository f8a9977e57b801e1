"""The trainer in one process: validation, logs, arguments."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from trainer_world import adaptive, logged, response_logits, tiny_config, tiny_model, tiny_trainer, token_rows

from distillm_ext.training.meters import METRICS

# ---- validation


def test_evaluation_is_weighted_by_token(tmp_path):
    rows, student, teacher = token_rows(7, seed=3), tiny_model(1), tiny_model(2, layers=2)
    with torch.no_grad():
        logits, targets = response_logits(student, rows)
        wanted, _ = response_logits(teacher, rows)
    metrics = tiny_trainer(tiny_config(tmp_path), model=student, teacher=teacher, eval_dataset=rows).evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-5)
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert metrics["eval_divergence"] == pytest.approx(float(kl), rel=1e-5)
    assert metrics["eval_tokens"] == len(targets)


def test_phi_follows_the_validation_loss(tmp_path):
    # A learning rate that destroys the student: the validation loss rises, so φ does.
    args = tiny_config(tmp_path, max_steps=8, learning_rate=1.0, **adaptive(sgo_initial=0.0, eval_steps=2))
    trainer = tiny_trainer(args)
    trainer.train()
    losses, phi = logged(trainer, "eval_loss"), 0.0
    for before, after in zip(losses, losses[1:], strict=False):
        phi += 0.1 if after > before + 0.1 else 0.0
    assert phi > 0 and trainer.run.policy.metrics()["phi"] == pytest.approx(phi)


def test_reference_schedule_starts_with_a_validation(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, **adaptive(schedule="reference")))
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[0] and trainer.state.log_history[0]["step"] == 0
    assert trainer.run.policy.schedule.reference_loss == trainer.state.log_history[0]["eval_loss"]


def test_several_evaluation_sets_have_their_own_metrics(tmp_path):
    sets = {"a": token_rows(3, seed=5), "b": token_rows(5, seed=6)}
    metrics = tiny_trainer(tiny_config(tmp_path), eval_dataset=sets).evaluate()
    assert {"eval_a_loss", "eval_b_divergence"} <= set(metrics)


def test_a_head_of_another_dtype_trains_under_autocast(tmp_path):
    student = tiny_model(1).bfloat16()
    student.lm_head.float()
    trainer = tiny_trainer(tiny_config(tmp_path, max_steps=1, bf16=True), model=student)
    assert trainer.run.student.reader.splits
    trainer.train()
    assert torch.isfinite(torch.tensor(logged(trainer, "loss"))).all()


# ---- logs


def test_every_log_has_the_method_in_it(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, max_steps=8, logging_steps=4, **adaptive()))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert entry["batches_data"] + entry["batches_fresh"] + entry["batches_replay"] == 4
        assert {"phi", "replay_size", "tokens_per_second", "batch_source", "loss_divergence", *METRICS} <= set(entry)
        shares = [entry[f"time_{name}"] for name in ("generation", "teacher", "student", "loss", "other")]
        assert all(0 <= share <= 1 for share in shares) and sum(shares) == pytest.approx(1.0, abs=0.02)
        assert entry["tokens_per_second"] > 0 and entry["time_student"] > 0


def test_a_log_is_the_mean_over_its_steps(tmp_path):
    def losses(every):
        args = tiny_config(tmp_path, max_steps=4, learning_rate=0.0, logging_steps=every, gradient_accumulation_steps=2)
        trainer = tiny_trainer(args, rows=8)
        trainer.train()
        return logged(trainer, "loss"), logged(trainer, "loss_divergence"), logged(trainer, "batches_data")

    one, two = losses(1), losses(2)
    assert (one[2], two[2]) == ([1] * 4, [2] * 2)
    for each, pairs in zip(one[:2], two[:2], strict=True):
        assert each == pytest.approx([each[0]] * 4, rel=1e-5) and pairs == pytest.approx([each[0]] * 2, rel=1e-5)


# ---- arguments


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"teacher": None}, TypeError, "teacher: expected a causal language model"),
        ({"model": None}, TypeError, "model: expected a causal language model"),
        ({"processing_class": None}, TypeError, "processing_class"),
        ({"train_dataset": [1, 2]}, TypeError, "train_dataset"),
    ],
)
def test_wrong_arguments(tmp_path, parts, error, message):
    with pytest.raises(error, match=message):
        tiny_trainer(tiny_config(tmp_path), **parts)


def test_adaptive_policy_needs_one_evaluation_set(tmp_path):
    args = tiny_config(tmp_path, **adaptive())
    with pytest.raises(ValueError, match="eval_dataset: .* got none"):
        tiny_trainer(args, eval_dataset=None)
    with pytest.raises(ValueError, match="eval_dataset: .* got a dict of 1"):
        tiny_trainer(args, eval_dataset={"a": token_rows(2)})


def test_buffer_smaller_than_a_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="replay_capacity: 7 .* set it to at least 8"):
        tiny_trainer(tiny_config(tmp_path, replay_capacity=7, gradient_accumulation_steps=2, **adaptive()))


def test_student_and_teacher_must_differ(tmp_path):
    model = tiny_model(1)
    with pytest.raises(ValueError, match="same object"):
        tiny_trainer(tiny_config(tmp_path), model=model, teacher=model)


def test_plain_arguments_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args: expected a DistillationConfig"):
        tiny_trainer(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_a_launcher_that_disagrees_is_refused(tmp_path, monkeypatch):
    args = tiny_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="started 2 processes, but the training arguments see 1"):
        tiny_trainer(args)
