"""The trainer in one process: the loss it minimises, normalisation, policies, validation, logs."""

import logging

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trainer_world import (
    EOS,
    VOCAB,
    GradientRecorder,
    adaptive,
    logged,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
    token_rows,
    weights,
)

from distillm_ext import reference
from distillm_ext.ops import linear_chunks
from distillm_ext.training.heads import LogitReader
from distillm_ext.training.meters import METRICS
from distillm_ext.training.policies import Source


def response_logits(model, rows):
    """Logits and targets of all response tokens, one row at a time and without padding."""
    logits, targets = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        mask = torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
        logits.append(model(ids).logits[0, :-1][mask])
        targets.append(ids[0, 1:][mask])
    return torch.cat(logits), torch.cat(targets)


def first_step(tmp_path, *, model=None, **settings):
    """Gradients of the first optimizer step and its log."""
    recorder = GradientRecorder()
    model = model or tiny_model(1)
    lm_dataset = settings.pop("lm_text", None)
    trainer = tiny_trainer(
        tiny_config(tmp_path, max_steps=1, max_grad_norm=0.0, **settings), rows=8, model=model, callbacks=[recorder],
        lm_dataset=lm_dataset,
    )  # fmt: skip
    trainer.train()
    return recorder.gradients, trainer.state.log_history[0]


def assert_gradients_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance * float(gradient.abs().max()))


def expected_gradients(loss_of, model):
    loss = loss_of(model)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, float(loss.detach())


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
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda module, args, output: ran.append(output.dim()))
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


# ---- policies


def recorded(trainer):
    """Trains and returns (decision, micro-batches) of every step."""
    seen, realise = [], trainer.rollouts.realise

    def spy(decision, batches, **where):
        result = realise(decision, batches, **where)
        seen.append((decision, result))
        return result

    reset = trainer.reset_extra_state

    def reset_and_spy():
        nonlocal realise
        reset()
        realise = trainer.rollouts.realise
        trainer.rollouts.realise = spy

    trainer.reset_extra_state = reset_and_spy
    trainer.train()
    return seen


def responses_of(batch):
    """(row, prompt, response) of each row, response tokens taken from the labels."""
    for ids, labels, length, row, mask in zip(
        batch["input_ids"], batch["labels"], batch["prompt_length"], batch["row"], batch["attention_mask"], strict=True
    ):
        n = int(mask.sum())
        assert (labels[: int(length)] == -100).all() and (labels[n:] == -100).all()
        assert torch.equal(labels[int(length) : n], ids[int(length) : n])
        yield int(row), ids[: int(length)].tolist(), ids[int(length) : n].tolist()


def test_on_policy_trains_on_the_students_responses(tmp_path):
    seen = recorded(tiny_trainer(tiny_config(tmp_path, policy="on_policy", gradient_accumulation_steps=2, max_steps=3)))
    rows = token_rows(16)
    assert len(seen) == 3
    for decision, batches in seen:
        assert decision.source is Source.FRESH and [len(batch["row"]) for batch in batches] == [4, 4]
        for batch in batches:
            for row, prompt, response in responses_of(batch):
                assert prompt == rows[row]["input_ids"][: rows[row]["prompt_length"]]
                assert 1 <= len(response) <= 6 and EOS not in response[:-1]


def test_responses_differ_between_steps_but_not_between_runs(tmp_path):
    def run():
        # No learning: only the step can make a difference.
        args = tiny_config(tmp_path, policy="on_policy", max_steps=4, learning_rate=0.0)
        return [sorted(responses_of(batches[0])) for _, batches in recorded(tiny_trainer(args, rows=4))]

    first = run()
    torch.manual_seed(99)
    assert run() == first
    assert len({str(step) for step in first}) == 4


def test_prompts_near_the_limit_still_get_a_response(tmp_path):
    rows = Dataset.from_list(
        [{"input_ids": [1] + [5] * 15 + [EOS], "loss_mask": [0] * 16 + [1], "prompt_length": 16}] * 4
    )
    args = tiny_config(tmp_path, policy="on_policy", max_length=17, max_prompt_length=16, max_steps=2)
    for _, batches in recorded(tiny_trainer(args, train_dataset=rows)):
        assert [len(response) for _, _, response in responses_of(batches[0])] == [1] * 4


def test_immediate_eos_gives_a_finite_loss(tmp_path):
    student = tiny_model(1)
    student.lm_head.register_forward_hook(
        lambda module, args, out: out + 100 * torch.eye(VOCAB)[EOS] if out.dim() > 1 else out
    )
    trainer = tiny_trainer(tiny_config(tmp_path, policy="on_policy"), model=student)
    for _, batches in recorded(trainer):
        assert all(response == [EOS] for batch in batches for _, _, response in responses_of(batch))
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))


def test_teacher_responses_are_made_once_per_row(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, policy="teacher_responses", max_steps=8), rows=16)
    found: dict[int, set] = {}
    for decision, batches in recorded(trainer):
        assert decision.source is Source.TEACHER
        for row, _, response in responses_of(batches[0]):
            found.setdefault(row, set()).add(tuple(response))
    assert sorted(found) == list(range(16)) and all(len(responses) == 1 for responses in found.values())


def test_batched_on_policy_answers_once_per_epoch(tmp_path):
    seen = recorded(tiny_trainer(tiny_config(tmp_path, policy="batched_on_policy", max_steps=8), rows=16))
    epochs = []
    for epoch in (seen[:4], seen[4:]):
        epochs.append({row: tuple(response) for _, bs in epoch for row, _, response in responses_of(bs[0])})
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("schedule", ["paper", "reference"])
def test_adaptive_policy_mixes_all_sources(tmp_path, schedule):
    args = tiny_config(tmp_path, max_steps=16, replay_capacity=8, **adaptive(schedule=schedule, sgo_initial=0.6))
    trainer = tiny_trainer(args)
    seen = recorded(trainer)
    assert {decision.source for decision, _ in seen} == {Source.DATA, Source.FRESH, Source.REPLAY}
    assert logged(trainer, "batch_source") == [decision.source.value for decision, _ in seen]
    assert logged(trainer, "replay_size")[-1] == 8 == len(trainer.rollouts.buffer)
    generated = set()
    for decision, batches in seen:
        found = {(row, tuple(response)) for batch in batches for row, _, response in responses_of(batch)}
        if decision.source is Source.FRESH:
            generated |= found if schedule == "reference" else set()
        elif decision.source is Source.REPLAY and schedule == "reference":
            assert found <= generated


def test_student_samples_are_no_ground_truth(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, policy="on_policy", ce_weight=1.0))
    trainer.train()
    assert not logged(trainer, "loss_ce") and len(logged(trainer, "loss_divergence")) == 4
    taught = tiny_trainer(tiny_config(tmp_path, policy="teacher_responses", ce_weight=1.0))
    taught.train()
    assert len(logged(taught, "loss_ce")) == 4


def test_generation_leaves_the_global_generators(tmp_path):
    def dropout_losses(policy, **settings):
        args = tiny_config(tmp_path, policy=policy, max_steps=3, learning_rate=0.0, **settings)
        trainer = tiny_trainer(args, model=tiny_model(1, attention_dropout=0.5))
        states = []
        step = trainer.training_step
        trainer.training_step = lambda *a, **k: states.append(torch.get_rng_state()) or step(*a, **k)
        trainer.train()
        return states

    plain, generating = dropout_losses("dataset"), dropout_losses("mixed", mixed_fraction=1.0)
    assert torch.equal(plain[0], generating[0])


# ---- warm-up


@pytest.mark.parametrize(("objective", "part"), [("sft", "loss_ce"), ("forward_kl", "loss_divergence")])
def test_warm_up_uses_data_then_the_policy(tmp_path, objective, part):
    args = tiny_config(tmp_path, policy="on_policy", max_steps=5, warmup_objective=objective, warmup_objective_steps=2)
    trainer = tiny_trainer(args)
    trainer.train()
    assert logged(trainer, "batch_source") == ["data", "data", "fresh", "fresh", "fresh"]
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first[part])


def test_sft_warm_up_is_cross_entropy_and_needs_no_teacher(tmp_path):
    rows = token_rows(8)

    def loss_of(model):
        return cross_entropy(*response_logits(model, rows))

    expected, loss = expected_gradients(loss_of, tiny_model(1))
    found, log = first_step(tmp_path, per_device_train_batch_size=8, warmup_objective="sft", warmup_objective_steps=1)
    assert_gradients_equal(found, expected)
    assert log["loss"] == pytest.approx(loss, rel=1e-5) and log["time_teacher"] == 0


def test_validations_of_the_warm_up_do_not_raise_phi(tmp_path):
    args = tiny_config(
        tmp_path, max_steps=6, warmup_objective="sft", warmup_objective_steps=4, learning_rate=1.0,
        **adaptive(sgo_initial=0.0, sgo_threshold=0.0, eval_steps=1),
    )  # fmt: skip
    trainer = tiny_trainer(args)
    trainer.train()
    assert max(logged(trainer, "eval_loss")[:4]) > logged(trainer, "eval_loss")[0]  # it did rise
    assert logged(trainer, "phi")[:4] == [0.0] * 4


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
    assert phi > 0 and trainer.policy.metrics()["phi"] == pytest.approx(phi)


def test_reference_schedule_starts_with_a_validation(tmp_path):
    trainer = tiny_trainer(tiny_config(tmp_path, **adaptive(schedule="reference")))
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[0] and trainer.state.log_history[0]["step"] == 0
    assert trainer.policy.schedule.reference_loss == trainer.state.log_history[0]["eval_loss"]


def test_several_evaluation_sets_have_their_own_metrics(tmp_path):
    sets = {"a": token_rows(3, seed=5), "b": token_rows(5, seed=6)}
    metrics = tiny_trainer(tiny_config(tmp_path), eval_dataset=sets).evaluate()
    assert {"eval_a_loss", "eval_b_divergence"} <= set(metrics)


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
