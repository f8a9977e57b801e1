"""Rows of a prompt alone: enough where every step writes its own responses, refused by row elsewhere."""

from __future__ import annotations

import json

import pytest
from data_world import CHATML, TALK, make_bpe, prepare
from datasets import Dataset
from trainer_world import logged, tiny_config, tiny_tokenizer, tiny_trainer, token_rows, weights

from distillm_ext.data.rows.loading import load_rows
from distillm_ext.training.rollouts.policies import POLICIES, reads_responses

USER = [{"role": "user", "content": "w5 w6"}]
TEXT = [{"prompt": f"w{4 + i} w{9 + i}"} for i in range(8)]
KINDS = {
    "text": TEXT,
    "with responses between": [*({**row, "completion": "w7"} for row in TEXT[:4]), *TEXT[4:]],
    "messages": [{"prompt": USER}] * 8,
    "conversation": [{"messages": USER}] * 8,
    "conversation that goes on": [{"messages": [*USER, {"role": "assistant", "content": "w8"}, *USER]}] * 8,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"


def tokenizer():
    made = tiny_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("policy", POLICIES)
def test_which_policies_read_responses(policy):
    writes = policy in ("on_policy", "batched_on_policy", "teacher_responses")
    assert reads_responses(policy, mixed_fraction=0.99, warmup_steps=0) is not writes
    assert reads_responses(policy, mixed_fraction=1.0, warmup_steps=0) is not (writes or policy == "mixed")
    assert reads_responses(policy, mixed_fraction=1.0, warmup_steps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_rows_are_the_generation_prompt_without_targets(kind):
    rows = Dataset.from_list(KINDS[kind])
    found = prepare(rows, tokenizer(), prompts_only=True)
    assert len(found) == 8
    for row, made in zip(KINDS[kind], found, strict=True):
        alone = "completion" not in row
        assert (made["prompt_length"] == len(made["input_ids"])) == alone == (not any(made["loss_mask"]))
        text = row.get("prompt", row.get("messages"))
        if not isinstance(text, str):
            text = tokenizer().apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        assert made["input_ids"][: made["prompt_length"]] == tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("policy", ["on_policy", "batched_on_policy", "teacher_responses"])
def test_training_is_that_of_the_same_prompts_with_responses(tmp_path, policy):
    """The responses of the data are not read: with them or without, the gradients are equal."""
    settings = dict(policy=policy, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    if policy != "batched_on_policy":
        settings |= dict(reuse_teacher_logits="topk", reuse_k=8)
    rows = token_rows(8)
    short = [{**row, "input_ids": row["input_ids"][: row["prompt_length"]], "loss_mask": [0] * row["prompt_length"]}
             for row in rows]  # fmt: skip
    found = {}
    for name, data in (("whole", rows), ("alone", Dataset.from_list(short))):
        trainer = tiny_trainer(tiny_config(tmp_path / name, max_steps=3, **settings), train_dataset=data)
        trainer.train()
        found[name] = (logged(trainer, "loss"), weights(trainer))
    assert found["alone"][0] == found["whole"][0]
    assert all(found["alone"][1][name].equal(value) for name, value in found["whole"][1].items())


def test_a_run_on_prompts_resumes_bit_equal(tmp_path):
    settings = dict(policy="teacher_responses", max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="no")

    def run(folder, **overrides):
        parts = dict(train_dataset=Dataset.from_list(TEXT), eval_dataset=None, processing_class=tokenizer())
        return tiny_trainer(tiny_config(folder, **(settings | overrides)), **parts)

    whole = run(tmp_path)
    whole.train()
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(weights(resumed)[name].equal(value) for name, value in weights(whole).items())


REFUSED = [
    (dict(policy="dataset"), {}, "train_dataset, row 5: column 'completion' is missing or null, so there is no"),
    (dict(policy="mixed", mixed_fraction=0.9), {}, "train_dataset, row 5: "),
    (dict(policy="on_policy", warmup_objective="sft", warmup_objective_steps=1), {}, "train_dataset, row 5: "),
    (dict(policy="on_policy"), dict(eval_dataset=Dataset.from_list(TEXT)), "eval_dataset, row 1: "),
]


@pytest.mark.parametrize(("settings", "parts", "message"), REFUSED)
def test_rows_without_a_response_are_refused_where_one_is_read(tmp_path, settings, parts, message):
    mixed = Dataset.from_list([*({**row, "completion": "w7"} for row in TEXT[:4]), *TEXT[4:]])
    parts = dict(train_dataset=mixed, processing_class=tokenizer()) | parts
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tiny_config(tmp_path, **settings), **parts)


def test_a_file_of_prompts_loads_and_is_refused_by_line_where_responses_are_needed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])))
    assert load_rows(path)["prompt"][:] == ["a", "a"]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: column 'completion' is missing"):
        load_rows(path, need_responses=True)


def test_conversations_without_an_answer_and_token_rows_of_a_prompt(tmp_path):
    chat = make_bpe(CHATML, eos_token="<|im_end|>")
    with pytest.raises(ValueError, match="row 1: messages has no assistant turn, so there is no response to learn"):
        prepare([{"messages": TALK[:1]}], chat)
    tokens = prepare([{"messages": TALK}, {"messages": TALK[:1]}], chat, prompts_only=True)
    assert prepare(tokens, chat, prompts_only=True)[:] == tokens[:]
    with pytest.raises(ValueError, match="row 2: prompt_length leaves no token of input_ids"):
        prepare(tokens, chat)


def test_prompts_count_as_targets_nowhere(tmp_path):
    """The loss of a step on generated responses is a mean over the generated tokens."""
    trainer = tiny_trainer(
        tiny_config(tmp_path, policy="on_policy", max_steps=1), train_dataset=Dataset.from_list(TEXT),
        processing_class=tokenizer(), eval_dataset=None,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["targets"]) == 0 and batch["row_targets"] == [0] * 4
    trainer.train()
    assert logged(trainer, "batches_fresh") == [1] and logged(trainer, "loss")[0] > 0
