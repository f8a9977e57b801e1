"""Rows from files, and their tokenisation: prefix property, targets, truncation, and messages for bad rows."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distillm_ext.training.data import prepare_dataset
from distillm_ext.training.rows import load_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "hello hello"},
    {"role": "assistant", "content": "the end"},
]


def make_bpe(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges over any border it can: "helloworld" is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<bos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["helloworld hello world helloworld the end"] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", **special})
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def bpe():
    return make_bpe()


@pytest.fixture(scope="module")
def chat():
    return make_bpe(CHATML, eos_token="<|im_end|>")


def prepare(rows, tokenizer, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer, **{"max_prompt_length": 64, "max_length": 128, **options})


def targets(row):
    return [token for token, flag in zip(row["input_ids"], row["loss_mask"], strict=True) if flag]


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
    from tokenizers.processors import TemplateProcessing

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


# ---- bad rows


GOOD = {"prompt": "hello", "completion": "world"}
BAD = [
    ({"prompt": "a"}, "'completion' is missing"),
    ({"completion": "a"}, "'prompt' is missing"),
    ({"prompt": "a", "completion": None}, "'completion' is missing"),
    ({"prompt": "a", "completion": 3}, "str and int"),
    ({"prompt": "a", "completion": []}, "two strings or two lists"),
    ({"prompt": [], "completion": TALK[1:2]}, "prompt is an empty list"),
    ({"prompt": TALK[:1], "completion": TALK[:1]}, "completion has no assistant turn"),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": TALK[:1]}, "no assistant turn"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": ["hello"]}, r"messages\[0\] must be a mapping"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]\['content'\] must be a string, got null"),
    ({"messages": [{"role": 1, "content": "x"}]}, r"messages\[0\]\['role'\] must be a string"),
    ({"question": "a", "answer": "b"}, "found: 'question', 'answer'"),
    ({"input_ids": [1, 2], "loss_mask": [1], "prompt_length": 1}, "lists of one length"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1], "prompt_length": 2}, r"prompt_length must be in 1\.\.1"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_row_of_a_file_is_reported_with_file_and_line(tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (GOOD, GOOD)) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 4: .*{message}"):
        load_rows(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "invalid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"prompt": "\xff"}', "invalid"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "no character"),
    ],
)
def test_broken_line_is_reported_with_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: .*{message}"):
        load_rows(path)


def test_change_of_type_inside_a_file_names_both_lines(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({"prompt": TALK[:1], "completion": TALK[1:2]}))
    with pytest.raises(ValueError, match="line 2: prompt is list here and str in line 1"):
        load_rows(path)


def test_bad_row_of_a_dataset_is_reported_with_its_number(bpe):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", None]})
    with pytest.raises(ValueError, match="train.parquet, row 2: column 'completion' is missing"):
        prepare(rows, bpe, source="train.parquet")


def test_empty_prompt_is_an_error(bpe):
    with pytest.raises(ValueError, match="row 1: the prompt has no token"):
        prepare([{"prompt": "", "completion": "x"}], bpe)


def test_conversation_without_a_template_is_an_error(bpe):
    with pytest.raises(ValueError, match="row 1: .*set tokenizer.chat_template"):
        prepare([{"messages": TALK}], bpe)


def test_conversation_that_the_assistant_opens_is_an_error(chat):
    with pytest.raises(ValueError, match="row 1: .*no prompt"):
        prepare([{"messages": TALK[1:2]}], chat)


# ---- files


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "dict")
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "saved", "dict"):
        assert load_rows(tmp_path / name).to_list() == rows, name
        assert load_rows(str(tmp_path / name), split="train[1:3]").to_list() == rows[1:3], name


def test_messages_with_differing_keys_share_a_file(tmp_path, chat):
    path = tmp_path / "talk.jsonl"
    named = [{"role": "user", "content": "hello", "name": "Ann"}, {"role": "assistant", "content": "world"}]
    path.write_text(json.dumps({"messages": TALK, "id": 7}) + "\n" + json.dumps({"messages": named, "id": "x"}))
    rows = prepare(load_rows(path), chat)
    assert chat.decode(targets(rows[1])) == "world<|im_end|>"


def test_columns_are_mapped(tmp_path):
    source = [{"instruction": "a", "output": "b", "prompt": "other"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(source[0]))
    Dataset.from_list(source).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        rows = load_rows(tmp_path / name, columns={"prompt": "instruction", "completion": "output"})
        assert rows.select_columns(["prompt", "completion"]).to_list() == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match="maps 'prompt' to 'question'"):
        load_rows(tmp_path / "a.parquet", columns={"prompt": "question", "completion": "output"})


def test_plain_text_rows_load(tmp_path, bpe):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "hello world"}))
    rows = load_rows(tmp_path / "text.jsonl")
    assert rows["text"][:] == ["hello world"]
    with pytest.raises(ValueError, match="kind 'text' has no prompt"):
        prepare(rows, bpe)


def test_bad_sources(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "broken.json").write_text("[{]")
    with pytest.raises(ValueError, match="cannot read .csv"):
        load_rows(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="holds no row"):
        load_rows(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load_rows(tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match="broken.json: invalid JSON"):
        load_rows(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="split 'test'"):
        load_rows(tmp_path / "a.jsonl", split="test")
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        load_rows(tmp_path / "missing.jsonl")
