"""Tokenisation of rows: prefix property, targets, truncation."""

from __future__ import annotations

import logging

import pytest
from data_world import CHATML, MARKED, TALK, make_bpe, prepare, targets
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from distillm_ext.data.tokenise import prepare_dataset


@pytest.fixture(scope="module")
def bpe():
    return make_bpe()


@pytest.fixture(scope="module")
def chat():
    return make_bpe(CHATML, eos_token="<|im_end|>")


# ---- plain strings


def test_plain_prompt_is_a_token_prefix_where_joint_tokenisation_would_merge(bpe):
    assert len(bpe("helloworld")["input_ids"]) == 1  # else the row below would not test the border
    row = prepare([{"prompt": "hello", "completion": "world"}], bpe)[0]
    prompt = bpe("hello")["input_ids"]
    assert row["input_ids"][: row["prompt_length"]] == prompt
    assert row["input_ids"] == prompt + bpe("world")["input_ids"] + [bpe.eos_token_id]
    assert row["loss_mask"] == [0] * len(prompt) + [1] * (len(row["input_ids"]) - len(prompt))


def test_plain_row_decodes_to_prompt_completion_eos(bpe):
    row = prepare([{"prompt": "the end ", "completion": " hé🙂\n"}], bpe)[0]
    assert bpe.decode(row["input_ids"]) == "the end  hé🙂\n<eos>"


def test_completion_that_ends_in_eos_gets_no_second_one(bpe):
    row = prepare([{"prompt": "hello", "completion": "world<eos>"}], bpe)[0]
    assert row["input_ids"].count(bpe.eos_token_id) == 1


def test_empty_completion_trains_the_immediate_eos(bpe):
    assert targets(prepare([{"prompt": "hello", "completion": ""}], bpe)[0]) == [bpe.eos_token_id]


def test_bos_stands_once_before_the_prompt():
    tokenizer = make_bpe(bos_token="<bos>")
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    row = prepare([{"prompt": "hello", "completion": "world"}], tokenizer)[0]
    assert row["input_ids"][0] == bos and row["input_ids"].count(bos) == 1
    assert row["input_ids"][: row["prompt_length"]] == tokenizer("hello")["input_ids"]


def test_tokenizer_without_eos_is_an_error():
    tokenizer = make_bpe()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        prepare([{"prompt": "a", "completion": "b"}], tokenizer)


# ---- conversations


def test_last_turn_is_the_target_without_marks(chat):
    row = prepare([{"messages": TALK}], chat)[0]
    prompt = chat.apply_chat_template(TALK[:-1], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert row["input_ids"][: row["prompt_length"]] == list(prompt)
    assert chat.decode(targets(row)) == "the end<|im_end|>"  # the line break behind the end of turn is no target


def test_marked_template_trains_every_assistant_turn():
    tokenizer = make_bpe(MARKED, eos_token="<|im_end|>")
    row = prepare([{"messages": TALK}], tokenizer)[0]
    assert tokenizer.decode(targets(row)) == "world<|im_end|>the end<|im_end|>"
    assert tokenizer.decode(row["input_ids"][row["prompt_length"] :]) == "the end<|im_end|>"


def test_marks_survive_a_merge_over_the_border_of_the_prompt():
    # Without a line break between header and answer, "hello" + "world" merge in the joint tokenisation.
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}hello{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}hello{% endif %}"
    )
    tokenizer = make_bpe(template, eos_token="<|im_end|>")
    row = prepare([{"messages": TALK[:2]}], tokenizer)[0]
    assert tokenizer.decode(targets(row)) == "world<|im_end|>"
    assert tokenizer.decode(row["input_ids"][: row["prompt_length"]]) == "hello hello"


def test_conversational_completion_trains_nothing_of_the_prompt():
    tokenizer = make_bpe(MARKED, eos_token="<|im_end|>")
    row = prepare([{"prompt": TALK[:3], "completion": TALK[3:]}], tokenizer)[0]
    assert tokenizer.decode(targets(row)) == "the end<|im_end|>"


def test_turns_after_the_last_assistant_turn_are_left_out(chat):
    whole = prepare([{"messages": TALK}], chat)[0]
    assert prepare([{"messages": [*TALK, {"role": "user", "content": "bye"}]}], chat)[0] == whole


def test_messages_win_where_only_the_prompt_column_is_there_too(chat):
    row = prepare([{"prompt": "hello", "messages": TALK}], chat)[0]
    assert chat.decode(targets(row)) == "the end<|im_end|>"


def test_template_whose_generation_prompt_is_no_prefix_is_an_error():
    tokenizer = make_bpe("{% if add_generation_prompt %}x{% endif %}{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="row 1: the chat template does not begin"):
        prepare([{"messages": TALK[:2]}], tokenizer)


def test_error_inside_the_template_names_the_row():
    tokenizer = make_bpe("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"mine, row 1: the chat template rejects.*roles must alternate"):
        prepare([{"messages": TALK[:2]}], tokenizer, source="mine")


# ---- truncation


def test_prompt_is_cut_on_the_left_and_the_row_on_the_right(bpe):
    rows = [{"prompt": "the end of it", "completion": "hello the end of it"}]
    whole = prepare(rows, bpe)[0]
    cut = prepare(rows, bpe, max_prompt_length=3, max_length=6)[0]
    start = whole["prompt_length"] - 3
    assert cut["prompt_length"] == 3
    assert cut["input_ids"] == whole["input_ids"][start : start + 6]
    assert cut["loss_mask"] == [0, 0, 0, 1, 1, 1]


def test_row_that_loses_its_whole_response_is_dropped_and_counted(bpe, caplog):
    rows = [{"prompt": "hello the end " * 4, "completion": "x"}, {"prompt": "hello", "completion": "y"}]
    with caplog.at_level(logging.WARNING):
        kept = prepare(rows, bpe, max_prompt_length=64, max_length=5, source="rows.jsonl")
    assert len(kept) == 1
    assert bpe.decode(targets(kept[0])) == "y<eos>"
    assert "rows.jsonl: dropped 1 of 2 rows" in caplog.text


def test_no_row_left_is_an_error(bpe):
    with pytest.raises(ValueError, match="none of the 1 rows keeps a response token"):
        prepare([{"prompt": "hello the end " * 4, "completion": "x"}], bpe, max_length=3)


def test_the_first_token_is_never_a_target():
    tokenizer = make_bpe(MARKED, eos_token="<|im_end|>")
    whole = prepare([{"messages": TALK}], tokenizer)[0]
    first = whole["loss_mask"].index(1)
    # Cut so that the row begins in the middle of the first assistant turn.
    cut = prepare([{"messages": TALK}], tokenizer, max_prompt_length=whole["prompt_length"] - first)[0]
    assert cut["input_ids"][0] == whole["input_ids"][first]
    assert cut["loss_mask"] == [0, *whole["loss_mask"][first + 1 :]]


@pytest.mark.parametrize("name", ["max_prompt_length", "max_length"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_bad_lengths(bpe, name, value):
    with pytest.raises(ValueError, match=name):
        prepare([{"prompt": "a", "completion": "b"}], bpe, **{name: value})


def test_token_rows_pass_through(bpe):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "prompt_length": 1, "extra": "x"}])
    out = prepare(rows, bpe)
    assert sorted(out.column_names) == ["input_ids", "loss_mask", "prompt_length"]
    assert out[0]["input_ids"] == [5, 6, 7]


def test_other_containers_are_refused(bpe):
    with pytest.raises(TypeError, match="load_rows"):
        prepare_dataset([{"prompt": "a", "completion": "b"}], bpe, max_prompt_length=4, max_length=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_mask": [0, -100, 1]}, "row 2: loss_mask must hold 0 and 1, got -100"),
        ({"loss_mask": [0.0, 0.5, 1.0]}, "loss_mask must hold 0 and 1, got 0.0"),
        ({"loss_mask": [0, 2, 1]}, "row 2: loss_mask must hold 0 and 1, got 2"),
        ({"loss_mask": [0, None, 1]}, "row 2: loss_mask must hold 0 and 1, got None"),
        ({"loss_mask": [0, 1]}, "row 2: input_ids and loss_mask must be lists of one length"),
        ({"input_ids": [5, None, 7]}, "row 2: input_ids must hold integers, got None"),
        ({"input_ids": None}, "row 2: "),
        ({"prompt_length": 3}, "row 2: prompt_length leaves no token"),
        ({"prompt_length": 0}, r"row 2: prompt_length must be in 1\.\.3"),
    ],
)
def test_bad_token_rows_are_named(bpe, change, message):
    good = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "prompt_length": 1}
    first = {**good, "loss_mask": [float(i) for i in good["loss_mask"]]} if "0.5" in str(change) else good
    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list([first, {**good, **change}]), bpe)


def test_token_rows_without_a_target_are_counted_and_refused_where_there_is_no_other(bpe, caplog):
    good = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "prompt_length": 1}
    # The first token has nothing before it, so a target there is none.
    none = {**good, "loss_mask": [1, 0, 0]}
    with caplog.at_level(logging.WARNING):
        assert len(prepare([good, none], bpe, source="mine")) == 2
    assert "mine: loss_mask has no target in 1 of 2 rows" in caplog.text
    with pytest.raises(ValueError, match="mine: loss_mask has no target in 2 of 2 rows, so there is nothing to learn"):
        prepare([none, none], bpe, source="mine")
    alone = {"input_ids": [5, 6], "loss_mask": [0, 0], "prompt_length": 2}
    assert len(prepare([alone], bpe, prompts_only=True)) == 1


def test_a_row_cut_before_its_first_target_is_dropped():
    """The marks leave out the first words of the answer, and the limit the rest."""
    marks = "{% generation %}of it{% endgeneration %}<|im_end|>"
    template = "{% for m in messages %}{% if m.role == 'user' %}hello {% else %}{{ m.content }} "
    tokenizer = make_bpe(template + marks + "{% endif %}{% endfor %}", eos_token="<|im_end|>")
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": "the end"}]}]
    whole = prepare(rows, tokenizer)[0]
    first = whole["loss_mask"].index(1)
    assert first > whole["prompt_length"]
    with pytest.raises(ValueError, match="none of the 1 rows keeps"):
        prepare(rows, tokenizer, max_length=first)


@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
def test_a_completion_with_its_own_end_and_white_space_gets_no_second_end(bpe, behind):
    row = prepare([{"prompt": "hello", "completion": f"world<eos>{behind}"}], bpe)[0]
    assert bpe.decode(targets(row)) == "world<eos>"
    # An end inside the text is none.
    row = prepare([{"prompt": "hello", "completion": f"world<eos>{behind}x"}], bpe)[0]
    assert bpe.decode(targets(row)) == f"world<eos>{behind}x<eos>"


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = make_bpe(bos_token="<bos>")
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    for row in ({"prompt": "<bos>hello", "completion": "world"}, {"prompt": "<bos>hello"}):
        assert prepare([row], tokenizer, prompts_only=True)[0]["input_ids"].count(bos) == 1
