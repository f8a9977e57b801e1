"""The loss that the trainer minimises, in one process: formula, normalisation, fused heads, vocabularies."""

import logging

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trainer_world import (
    VOCAB,
    GradientRecorder,
    assert_gradients_equal,
    expected_gradients,
    first_step,
    logged,
    response_logits,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
    token_rows,
    weights,
)

from distillm_ext import reference
from distillm_ext.models.logit_reader import LogitReader
from distillm_ext.ops import linear_chunks
from distillm_ext.training.meters import METRICS

# ---- the loss


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "adaptive_kl"])
def test_first_gradient_is_that_of_the_formula(tmp_path, divergence):
    teacher, rows = tiny_model(2, layers=2), token_rows(8)

    def loss_of(model):
        student, targets = response_logits(model, rows)
        with torch.no_grad():
            wanted, _ = response_logits(teacher, rows)
        options = {"alpha": 0.1} if divergence.startswith("skew") else {}
        value = reference.per_token_divergence(student / 1.0, wanted, divergence=divergence, temperature=2.0, **options)
        return (value.sum() + 0.5 * cross_entropy(student, targets, reduction="sum")) / len(targets)

    expected, loss = expected_gradients(loss_of, tiny_model(1))
    found, log = first_step(
        tmp_path, divergence=divergence, temperature=2.0, ce_weight=0.5, per_device_train_batch_size=8
    )
    assert_gradients_equal(found, expected)
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["loss_divergence"] + 0.5 * log["loss_ce"] == pytest.approx(loss, rel=1e-5)


def test_accumulation_equals_one_big_batch(tmp_path):
    text = Dataset.from_dict({"input_ids": [list(range(4, 60))] * 9})
    settings = dict(ce_weight=0.3, lm_text=text, lm_weight=0.7, max_length=24)
    whole, log = first_step(tmp_path, per_device_train_batch_size=8, **settings)
    for size in (4, 2, 1):
        split, split_log = first_step(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, **settings
        )
        assert_gradients_equal(split, whole)
        for key in ("loss", "loss_divergence", "loss_ce", "loss_lm", *METRICS):
            assert split_log[key] == pytest.approx(log[key], rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_metrics_are_means_over_the_targets(tmp_path, monkeypatch, fused):
    rows, logits = token_rows(8), []
    for model in (tiny_model(2, layers=2), tiny_model(1)):
        with torch.no_grad():
            logits.append(response_logits(model, rows)[0] / 2.0)
    expected = {
        name: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()
        for name, x in zip(("teacher_entropy", "student_entropy"), logits, strict=True)
    }
    expected["top1_agreement"] = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()
    if not fused:
        monkeypatch.setattr(LogitReader, "fuses", lambda self: False)
    _, log = first_step(tmp_path, temperature=2.0, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, value in expected.items():
        assert log[name] == pytest.approx(float(value), rel=1e-5)


def test_plain_text_adds_its_own_mean(tmp_path):
    block = list(range(4, 36))
    text = Dataset.from_dict({"input_ids": [block]})
    with torch.no_grad():
        logits = tiny_model(1)(torch.tensor([block])).logits[0]
    expected = float(cross_entropy(logits[:-1], torch.tensor(block[1:])))
    _, log = first_step(tmp_path, per_device_train_batch_size=8, lm_text=text, lm_weight=0.5)
    assert log["loss_lm"] == pytest.approx(expected, rel=1e-5)
    assert log["loss"] == pytest.approx(log["loss_divergence"] + 0.5 * expected, rel=1e-5)


def test_full_logit_fallback_trains_alike(tmp_path, caplog):
    plain, _ = first_step(tmp_path, per_device_train_batch_size=8)
    model = tiny_model(1)
    # A scale behind the head that no table knows of: the check at start must notice it.
    model.config.final_logit_softcapping = 0.001
    with caplog.at_level(logging.WARNING):
        fallback, _ = first_step(tmp_path, per_device_train_batch_size=8, model=model)
    assert "computing full logits" in caplog.text
    assert_gradients_equal(fallback, plain)


FUSED_JOBS = {
    "plain": {},
    "ce": dict(ce_weight=0.5, temperature=2.0),
    "text": dict(ce_weight=0.3, lm_weight=0.7, max_length=24, gradient_accumulation_steps=2),
    "sft": dict(warmup_objective="sft", warmup_objective_steps=1),
    "bf16": dict(bf16=True),
    "cut": dict(divergence="forward_kl", ce_weight=0.5),
}


@pytest.mark.parametrize("job", FUSED_JOBS)
def test_fused_heads_train_like_materialised_logits(tmp_path, monkeypatch, job):
    """Student and teacher fused, neither, or one of both: same gradients, log and validation."""

    def run(fused_student, fused_teacher):
        def fuses(reader):
            return fused_teacher if reader.model.config.num_hidden_layers == 2 else fused_student

        monkeypatch.setattr(LogitReader, "fuses", fuses)
        recorder, settings = GradientRecorder(), {"max_steps": 1, "max_grad_norm": 0.0, **FUSED_JOBS[job]}
        text = Dataset.from_dict({"input_ids": [list(range(4, 60))] * 9}) if job == "text" else None
        trainer = tiny_trainer(
            tiny_config(tmp_path, eval_strategy="steps", eval_steps=1, **settings), rows=8, callbacks=[recorder],
            model=tiny_model(1, vocab=72 if job == "cut" else VOCAB, tied=job == "sft"), lm_dataset=text,
        )  # fmt: skip
        trainer.train()
        numbers = {**trainer.state.log_history[0], **trainer.state.log_history[1]}
        names = [name for name in numbers if "loss" in name and "time" not in name] + ["eval_divergence"]
        return recorder.gradients, {name: numbers[name] for name in names}

    expected, log = run(False, False)
    for student, teacher in ((True, True), (True, False), (False, True)):
        found, found_log = run(student, teacher)
        # A bfloat16 weight gradient is rounded when it is materialised, and not when it is fused.
        assert_gradients_equal(found, expected, tolerance=1e-2 if job == "bf16" else 1e-5)
        assert found_log == pytest.approx(log, rel=1e-3 if job == "bf16" else 1e-5)
        assert {"loss", "eval_loss", "loss_ce" if job in ("ce", "text", "sft", "cut") else "loss"} <= found_log.keys()


def test_training_keeps_no_logits(tmp_path, monkeypatch):
    """Neither side's head runs its own product, and no more than a chunk's logits exist."""
    shapes, project = set(), linear_chunks.project

    def spy(*arguments):
        shapes.add(tuple(arguments[-1].shape))
        return project(*arguments)

    monkeypatch.setattr(linear_chunks, "project", spy)
    monkeypatch.setattr(linear_chunks, "MEMORY_BUDGET", 1)
    monkeypatch.setattr(linear_chunks, "MIN_CHUNK_ROWS", 3)
    student, teacher = tiny_model(1), tiny_model(2, layers=2)
    ran = []

    def record(module, args, output):
        ran.append(output.dim())

    record.__module__ = "torch.distributed.fsdp"  # whose hooks only care for the weight
    for model in (student, teacher):
        model.lm_head.register_forward_hook(record)
    trainer = tiny_trainer(tiny_config(tmp_path, max_steps=2), model=student, teacher=teacher)
    ran.clear()  # the check of the split at start
    trainer.train()
    # The student's head returns the loss; the teacher's own forward is not called.
    assert ran == [0, 0] and {rows <= 3 for rows, _ in shapes} == {True}


def test_a_head_that_does_not_fuse_trains_alike(tmp_path, caplog):
    class Wrapped(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden)

    expected, _ = first_step(tmp_path, per_device_train_batch_size=8)
    model = tiny_model(1)
    model.lm_head.__class__ = Wrapped
    with caplog.at_level(logging.WARNING):
        found, _ = first_step(tmp_path, per_device_train_batch_size=8, model=model)
    assert caplog.text.count("not fused with the head") == 1 and "Wrapped" in caplog.text
    assert_gradients_equal(found, expected)


def test_tied_and_bf16_students_train(tmp_path):
    tied = tiny_trainer(tiny_config(tmp_path, bf16=True, teacher_dtype="bfloat16"), model=tiny_model(1, tied=True))
    before = weights(tied)
    tied.train()
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in weights(tied).values())
    assert not torch.equal(before["model.embed_tokens.weight"], weights(tied)["model.embed_tokens.weight"])


def test_teacher_is_neither_trained_nor_saved(tmp_path):
    teacher = tiny_model(2, layers=2)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer = tiny_trainer(tiny_config(tmp_path, save_strategy="steps", save_steps=4), teacher=teacher)
    trainer.train()
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in teacher.named_parameters())
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned.isdisjoint(map(id, teacher.parameters()))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_distillation_brings_the_student_to_the_teacher(tmp_path):
    settings = dict(max_steps=60, divergence="forward_kl", learning_rate=5e-3, eval_strategy="steps", eval_steps=20)
    trainer = tiny_trainer(tiny_config(tmp_path, **settings), eval_dataset=token_rows(16))
    start = trainer.evaluate()["eval_divergence"]
    trainer.train()
    assert logged(trainer, "eval_divergence")[-1] < 0.5 * start


# ---- vocabularies


def test_vocabularies_of_different_size_are_cut_and_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(
            tiny_config(tmp_path, policy="on_policy", divergence="forward_kl"), model=tiny_model(1, vocab=72),
            teacher=tiny_model(2, vocab=80), processing_class=tiny_tokenizer(64),
        )  # fmt: skip
        trainer.train()
    assert trainer.vocab_size == 64
    assert "student 72, teacher 80, tokenizer 64" in caplog.text and "first 64" in caplog.text
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))
