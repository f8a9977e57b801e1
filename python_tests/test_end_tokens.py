"""What ends a response: tokenizer, both models and the data, in training, in evaluation and in the saved model."""

import logging

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken
from trainer_world import EOS, VOCAB, tiny_config, tiny_model, tiny_tokenizer, tiny_trainer, token_rows
from transformers import GenerationConfig

from distillm_ext.evaluation.metrics import evaluate_student
from distillm_ext.generation.ends import SCANNED_ROWS, end_token_ids, name_ends
from distillm_ext.training.checkpoints.folders import load_state

TURN = 3  # named "<unk>" by the tests' tokenizer; here it is made the end of a turn


def tokenizer():
    made = tiny_tokenizer()
    made.unk_token = None
    made.add_tokens([AddedToken("<unk>", special=True), AddedToken("w10", special=False)])
    return made


def rows(responses, prompt=(1, 5, 6)):
    """Token rows of these responses."""
    columns = [
        {
            "input_ids": [*prompt, *response],
            "loss_mask": [0] * len(prompt) + [1] * len(response),
            "prompt_length": len(prompt),
        }
        for response in responses
    ]
    return Dataset.from_list(columns)


def ends(responses, **options):
    return end_token_ids(tokenizer(), {"student": None}, rows(responses), **options)


def test_the_last_target_of_the_data_ends(caplog):
    with caplog.at_level(logging.WARNING):
        assert ends([[7, TURN], [8, 9, TURN], [9, EOS]]) == (EOS, TURN)
    assert [r.getMessage() for r in caplog.records if "'<unk>' (id 3)" in r.getMessage()]


@pytest.mark.parametrize(
    ("responses", "why"),
    [
        ([[7, 8], [9, 11]], "ordinary words"),
        ([[7, 10], [8, 11], [8, 12]], "an added word that some rows end with"),
        ([[TURN, 8], [TURN, 9], [7, TURN]], "a token that stands within responses"),
    ],
)
def test_what_is_no_end(responses, why, caplog):
    assert ends(responses) == (EOS,), why
    assert not caplog.records


def test_an_added_token_that_ends_most_rows_ends():
    assert ends([[7, 10], [8, 10], [9, 11]]) == (EOS, 10)


def test_rows_that_were_cut_tell_nothing():
    cut = [[7, 8, TURN], [8, EOS]]
    assert ends(cut) == (EOS, TURN) and ends(cut, max_length=6) == (EOS,)


def test_every_part_of_a_large_set_is_looked_at():
    count = 3 * SCANNED_ROWS
    late = rows([[7, EOS]] * 2 + [[7, TURN]])
    dataset = late.select([0] * (count - 30) + [2] * 30)
    assert end_token_ids(tokenizer(), {}, dataset) == (EOS, TURN)


def test_both_models_and_their_configurations_count():
    student, teacher = tiny_model(1), tiny_model(2)
    student.generation_config.eos_token_id = [EOS, 20]
    teacher.config.eos_token_id, teacher.generation_config.eos_token_id = 21, None
    assert end_token_ids(tokenizer(), {"student": student, "teacher": teacher}) == (EOS, 20, 21)
    assert end_token_ids(tokenizer(), {"student": student, "teacher": None}, {"not": "rows"}) == (EOS, 20)


def test_naming_ends_keeps_what_is_named():
    model = tiny_model(1)
    for before, expected in ((EOS, [EOS, 3]), (None, [2, 3]), ([7, EOS], [7, EOS, 3])):
        model.generation_config.eos_token_id = before
        name_ends(model, (2, 3))
        assert model.generation_config.eos_token_id == expected
    model.generation_config.eos_token_id = EOS
    name_ends(model, (EOS,))
    assert model.generation_config.eos_token_id == EOS


def likes(seed, token):
    model = tiny_model(seed)
    with torch.no_grad():
        model.lm_head.weight[token] = 3 * model.lm_head.weight[token]
    return model


def turns(count):
    """Rows whose responses end with the end of a turn."""
    return rows([[7 + i % 5, 20 + i, TURN] for i in range(count)])


def test_training_ends_there_and_so_does_the_saved_model(tmp_path):
    teacher = likes(2, 33)
    teacher.generation_config.eos_token_id = 33
    settings = dict(policy="on_policy", max_steps=1, max_new_tokens=12)
    trainer = tiny_trainer(
        tiny_config(tmp_path, **settings), model=likes(1, TURN), teacher=teacher, train_dataset=turns(8),
        processing_class=tokenizer(),
    )  # fmt: skip
    prompts = [[1, token] for token in range(4, VOCAB)]
    for source in (trainer.rollouts.student, trainer.rollouts.teacher):
        assert source.eos_token_ids == (EOS, TURN, 33)
        answers = source(prompts, range(len(prompts)))
        assert not any({EOS, TURN, 33} & set(answer[:-1]) for answer in answers)
        assert any(answer[-1] in (TURN, 33) for answer in answers)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert set(GenerationConfig.from_pretrained(tmp_path / "final").eos_token_id) == {EOS, TURN, 33}


def test_evaluation_ends_there(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "distillm_ext.evaluation.metrics.generate_responses",
        lambda model, prompts, params, **options: asked.append(options) or type("R", (), {"token_ids": [[7]] * 2}),
    )
    teacher = tiny_model(2)
    teacher.generation_config.eos_token_id = 33
    evaluate_student(
        tiny_model(1), turns(2), tokenizer(), teacher=teacher, generate_rows=2, max_new_tokens=9, max_length=8
    )
    assert asked[0]["eos_token_ids"] == (EOS, TURN, 33) and asked[0]["max_new_tokens"] == [5, 5]


def test_responses_with_other_ends_do_not_come_back(tmp_path, caplog):
    settings = dict(policy="teacher_responses", max_steps=2, save_strategy="steps", save_steps=1)
    first = tiny_trainer(tiny_config(tmp_path, **settings))
    first.train()
    assert first.rollouts.store.by_row
    for dataset, kept in ((token_rows(16), True), (turns(16), False)):
        again = tiny_trainer(tiny_config(tmp_path, **settings), train_dataset=dataset, processing_class=tokenizer())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again.run.restore(*load_state(tmp_path / "checkpoint-2"))
        assert bool(again.rollouts.store.by_row) == kept
        assert any("those of this run" in record.getMessage() for record in caplog.records) == (not kept)


def test_the_last_target_is_not_the_last_token():
    """White space behind the end of a turn is shown to the model and is no target."""
    made = rows([[7, TURN, 8], [9, 11, TURN, 8]]).to_list()
    for row in made:
        row["loss_mask"][-1] = 0
    assert end_token_ids(tokenizer(), {}, Dataset.from_list(made)) == (EOS, TURN)


def test_prompts_alone_are_answered_to_the_end_of_a_turn(tmp_path, caplog):
    """The data have no response to tell their end by: the chat template does."""
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}w4 {{ m.content }} w5 {% else %}{{ m.content }} <unk> "
        "{% endif %}{% endfor %}"
    )
    prompts = Dataset.from_list([{"messages": [{"role": "user", "content": f"w{i}"}]} for i in range(6, 14)])
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(
            tiny_config(tmp_path, policy="on_policy"), train_dataset=prompts, eval_dataset=None, processing_class=made
        )
    assert TURN in trainer.run.eos_token_ids and TURN in trainer.model.generation_config.eos_token_id
    assert any("'<unk>' (id 3)" in record.getMessage() for record in caplog.records)
