"""Rows from files, and messages for bad rows."""

from __future__ import annotations

import json

import pytest
from data_world import CHATML, TALK, make_bpe, prepare, targets
from datasets import Dataset, DatasetDict

from distillm_ext.data.plain_text import pack_text
from distillm_ext.data.rows.loading import load_rows


@pytest.fixture(scope="module")
def bpe():
    return make_bpe()


@pytest.fixture(scope="module")
def chat():
    return make_bpe(CHATML, eos_token="<|im_end|>")


# ---- bad rows


GOOD = {"prompt": "hello", "completion": "world"}
BAD = [
    ({"prompt": 3}, "prompt must be a list"),
    ({"completion": "a"}, "'prompt' is missing"),
    ({"prompt": "a", "completion": 3}, "str and int"),
    ({"prompt": "a", "completion": []}, "two strings or two lists"),
    ({"prompt": [], "completion": TALK[1:2]}, "prompt is an empty list"),
    ({"prompt": TALK[:1], "completion": TALK[:1]}, "completion has no assistant turn"),
    ({"messages": []}, "messages is an empty list"),
    ({"messages": "hello"}, "messages must be a list"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\['content'\] must be a string, got null"),
    ({"messages": [{"role": "assistant", "content": None, "name": "x"}]}, "must be a string, got null"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"\['content'\]\[0\] is a part of type 'image'"),
    ({"messages": [{**TALK[1], "weight": 0.5}]}, r"messages\[0\]\['weight'\] must be 0 or 1, got 0.5"),
    ({"messages": [{**TALK[1], "weight": True}]}, r"weight'\] must be 0 or 1, got True"),
    ({"messages": [{**TALK[1], "train": "yes"}]}, r"messages\[0\]\['train'\] must be true or false, got 'yes'"),
    ({"messages": [{**TALK[1], "train": True, "weight": 0}]}, "contradict each other"),
    ({"messages": TALK, "tools": "[bell"}, "tools must be a list, or its JSON text"),
    ({"messages": TALK, "tools": {"name": "bell"}}, "tools must be a list of mappings, got dict"),
    ({"messages": TALK, "documents": [3]}, r"documents\[0\] must be a mapping, got int"),
    ({"messages": TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs must be a mapping"),
    ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize' is no argument"),
    ({"messages": [TALK[0], {"role": "assistant", "content": None, "refusal": "no"}]}, "must be a string, got null"),
    ({"messages": [TALK[0], {**TALK[1], "tool_calls": "[]"}]}, r"\['tool_calls'\] must be a list of mappings, got str"),
    ({"messages": [TALK[0], {**TALK[1], "tool_calls": ["f"]}]}, r"\['tool_calls'\]\[0\] must be a mapping, got str"),
    ({"messages": [TALK[0], {**TALK[1], "tool_calls": [{"function": {"arguments": {}}}]}]}, r"\[0\] names no tool"),
    ({"messages": ["hello"]}, r"messages\[0\] must be a mapping"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]\['content'\] must be a string, got null"),
    ({"messages": [{"role": 1, "content": "x"}]}, r"messages\[0\]\['role'\] must be a string"),
    ({"question": "a", "answer": "b"}, "found: 'question', 'answer'"),
    ({"input_ids": [1, 2], "loss_mask": [1], "prompt_length": 1}, "lists of one length"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2], "prompt_length": 1}, "loss_mask must hold 0 and 1, got 2"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1], "prompt_length": 3}, r"prompt_length must be in 1\.\.2"),
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


def write(folder, **files):
    for name, prompt in files.items():
        path = folder / name.replace("_", ".")
        rows = [{"prompt": prompt, "completion": "x"}]
        if path.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        elif path.suffix == ".csv":
            path.write_text(f"prompt,completion\n{prompt},x\n")
        else:
            path.write_text(json.dumps(rows[0]))


@pytest.mark.parametrize("other", ["b_parquet", "b_csv"])
def test_a_folder_of_several_kinds_is_refused(tmp_path, other):
    write(tmp_path, a_jsonl="a", **{other: "b"})
    with pytest.raises(ValueError, match=r"several kinds: .*a\.jsonl.*keep files of one kind"):
        load_rows(tmp_path)


def test_files_of_a_folder_that_are_in_no_split_are_named(tmp_path, caplog):
    write(tmp_path, train_jsonl="a", more_jsonl="b", test_jsonl="c")
    (tmp_path / "config.json").write_text("{}")
    assert load_rows(tmp_path)["prompt"][:] == ["a"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "not read" in lines[0] and ": more.jsonl;" in lines[0]
    caplog.clear()
    (tmp_path / "all").mkdir()
    write(tmp_path / "all", a_jsonl="a", b_jsonl="b")
    assert sorted(load_rows(tmp_path / "all")["prompt"]) == ["a", "b"] and not caplog.records


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_columns_that_change_places(tmp_path, name):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    found = load_rows(tmp_path / name, columns={"prompt": "completion", "completion": "prompt"})
    assert found[0] == {"prompt": "b", "completion": "a"}


def test_a_name_that_means_nothing_here_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}))
    with pytest.raises(ValueError, match="columns: 'mesages' is no column.*did you mean 'messages'"):
        load_rows(tmp_path / "a.jsonl", columns={"mesages": "messages"})


@pytest.mark.parametrize("split", ["train[5:]", "train[3:]", "train[5:9]"])
def test_a_split_without_rows_is_refused_with_the_count(tmp_path, split):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(GOOD)] * 3))
    with pytest.raises(ValueError, match=r"a\.jsonl: split .*takes no row: 'train' has 3 rows"):
        load_rows(tmp_path / "a.jsonl", split=split)
    assert len(load_rows(tmp_path / "a.jsonl", split="train[2:9]")) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_file_s_own_column_in_whose_place_another_stands_is_named(tmp_path, name, caplog):
    rows = Dataset.from_list([{"prompt": "a", "input": "i", "completion": "b"}])
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_parquet(tmp_path / "a.parquet")
    assert load_rows(tmp_path / name, columns={"prompt": "input"})["prompt"][:] == ["i"]
    assert "not used: the columns 'prompt'" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a", None]}, "lm, row 2: text must be a string, got null"),
        ({"text": [1, 2]}, "lm, row 1: text must be a string, got int"),
        ({"input_ids": [[1, 2], None]}, "lm, row 2: input_ids must be a list of integers"),
        ({"input_ids": [[1, 2], [3, None]]}, "lm, row 2: input_ids must be a list of integers"),
        ({"input_ids": [[1.5, 2.0]]}, "lm, row 1: input_ids must be a list of integers"),
    ],
)
def test_bad_rows_of_plain_text_are_named(bpe, rows, message):
    with pytest.raises(ValueError, match=message):
        pack_text(Dataset.from_dict(rows), bpe, max_length=8, source="lm")
