"""Policies and warm-up of the trainer, in one process: what every step trains on."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trainer_world import (
    EOS,
    VOCAB,
    adaptive,
    assert_gradients_equal,
    expected_gradients,
    first_step,
    logged,
    response_logits,
    tiny_config,
    tiny_model,
    tiny_trainer,
    token_rows,
)

from distillm_ext.training.rollouts.policies import Source

# ---- policies


def recorded(trainer):
    """Trains and returns (decision, micro-batches) of every step."""
    seen, realise = [], trainer.rollouts.realise

    def spy(decision, batches, **where):
        result = realise(decision, batches, **where)
        seen.append((decision, result))
        return result

    reset = trainer.run.reset

    def reset_and_spy():
        nonlocal realise
        reset()
        realise = trainer.rollouts.realise
        trainer.rollouts.realise = spy

    trainer.run.reset = reset_and_spy
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
