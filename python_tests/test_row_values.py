"""What a chat template is given of a row is what the file says, whatever kind of file."""

from __future__ import annotations

import datetime
import decimal
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_world import make_bpe, prepare
from datasets import Dataset, load_from_disk

from distillm_ext.data.rows.loading import load_rows

# Shows everything that a template can see of the messages; the end of the turn is text.
SHOW = "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def show():
    return make_bpe(SHOW, eos_token="<|im_end|>")


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def talk(*calls, **more):
    turn = {"role": "assistant", "content": "", "tool_calls": list(calls), **more}
    return [{"role": "user", "content": "do it"}, turn]


# Keys of one row only, one key of several types, numbers that neither doubles nor short text hold, order of keys.
ROWS = [
    {"messages": talk(call("weather", {"city": "Rome", "at": 0.1234567890123456})), "id": 1},
    {"messages": talk(call("alarm", {"hour": 7, "city": 12345678901234567890, "note": None})), "id": "x"},
    {"messages": talk(call("alarm", {}), call("b", {"city": ["a", {"deep": [1, "two"]}]}), weight=1, zeta="z", al="a")},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "é🙂"}]},
                  {"role": "assistant", "content": "yo", "reasoning_content": "hm"},
                  {"role": "tool", "content": {"t": 1.5}, "tool_call_id": "1"}, *talk(call("c", {"city": True}))]},
]  # fmt: skip


def seen(rows, tokenizer):
    """The messages that the template was shown, row by row."""
    found = []
    for row in prepare(rows, tokenizer, max_prompt_length=2000, max_length=4000):
        texts = tokenizer.decode(row["input_ids"]).split("<|im_end|>")
        turns = [json.loads(text) for text in texts if text]
        # transformers gives a thought under its other name too.
        found.append([{key: value for key, value in turn.items() if key != "thinking"} for turn in turns])
    return found


def shown(messages):
    """What transformers passes on: keys that are null at the top of a message are not shown."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def test_json_files_and_folders_reach_the_template_unchanged(tmp_path, show, caplog):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-0.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "shards" / "train-1.jsonl").write_text("\n".join(lines[2:]))
    (tmp_path / "shards" / "test.jsonl").write_text(lines[0])
    expected = [shown(row["messages"]) for row in ROWS]
    for name in ("a.jsonl", "a.json", "shards"):
        caplog.clear()
        rows = load_rows(tmp_path / name)
        assert "not used: the columns 'id'" in caplog.text
        found = seen(rows, show)
        assert found == expected
        # Keys keep their order, which equality of mappings does not see.
        assert json.dumps(found) == json.dumps(expected)
        rows.save_to_disk(tmp_path / f"{name}.saved")
        assert seen(load_from_disk(tmp_path / f"{name}.saved"), show) == expected
    assert [m["role"] for m in load_rows(tmp_path / "a.jsonl")[3]["messages"]][:2] == ["user", "assistant"]
    both = load_rows(tmp_path / "shards", split="train[1:]+test")
    assert seen(both, show) == [*expected[1:], expected[0]]


def test_parquet_of_every_nested_type_reaches_the_template(tmp_path, show):
    """Arrow's structs have the keys of all rows: those that are null are left out, `content` of a message stays."""
    arguments = pa.struct([("city", pa.large_string()), ("hour", pa.int64())])
    function = pa.struct([("name", pa.large_string()), ("arguments", arguments)])
    mapped = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.int64()))])
    for kind, inner, wanted in (
        (pa.list_, function, [{"city": "Rome"}, {"hour": 7}, {}]),
        (pa.large_list, function, [{"city": "Rome"}, {"hour": 7}, {}]),
        (pa.list_view, function, [{"city": "Rome"}, {"hour": 7}, {}]),
        (pa.large_list, mapped, [{"city": 1}, {"hour": 7, "gone": None}, {}]),
    ):
        rows = [talk(call("f", arguments)) for arguments in wanted]
        for row in rows:
            row[1]["content"] = None
        calls = kind(pa.struct([("type", pa.string()), ("function", inner)]))
        texts = [(name, pa.string()) for name in ("role", "content", "name")]
        message = pa.struct([*texts, ("tool_calls", calls)])
        if inner is mapped:
            for row in rows:
                pairs = row[1]["tool_calls"][0]["function"]
                pairs["arguments"] = list(pairs["arguments"].items())
        table = pa.table({"messages": pa.array(rows, kind(message)), "other": [1, 2, 3]})
        pq.write_table(table, tmp_path / "a.parquet")
        found = seen(load_rows(tmp_path / "a.parquet"), show)
        assert [turns[1]["tool_calls"][0]["function"]["arguments"] for turns in found] == wanted, kind
        assert all("name" not in turns[1] for turns in found)
        assert load_rows(tmp_path / "a.parquet")[0]["messages"][1]["content"] is None


def test_flat_columns_of_view_and_dictionary_types_load(tmp_path):
    prompts, answers = pa.array(["a", "b"], pa.string_view()), pa.array(["x", "x"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": prompts, "completion": answers}), tmp_path / "a.parquet")
    rows = [{"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"}]
    assert load_rows(tmp_path / "a.parquet").to_list() == rows


def test_shards_of_parquet_with_uneven_columns_and_mapped_names(tmp_path, show):
    (tmp_path / "train").mkdir()
    for number, extra in enumerate(({"score": [1]}, {"source": ["x"], "tools": [[{"name": "bell"}]]})):
        part = {"conversations": [talk(call("f", {str(number): number}))], **extra}
        pq.write_table(pa.table(part), tmp_path / "train" / f"{number}.parquet")
    rows = load_rows(tmp_path, columns={"messages": "conversations"})
    assert sorted(rows.column_names) == ["messages", "tools"]
    assert [t[1]["tool_calls"][0]["function"]["arguments"] for t in seen(rows, show)] == [{"0": 0}, {"1": 1}]


def test_a_data_set_in_memory_loses_the_keys_that_arrow_added(show):
    rows = [{"messages": row["messages"][:2]} for row in ROWS[:1]] + [{"messages": talk(call("alarm", {"hour": 7}))}]
    assert seen(Dataset.from_list(rows), show) == [row["messages"] for row in rows]
    # A transform or a format of the user's own is applied, not passed by.
    shouted = Dataset.from_list([{"n": 1}])
    shouted.set_transform(lambda batch: {"messages": [talk(call("t", {"n": n})) for n in batch["n"]]})
    assert seen(shouted, show) == [talk(call("t", {"n": 1}))]


def test_what_json_cannot_hold_is_refused_by_file_and_column(tmp_path):
    rows = [[{"role": "user", "content": b"raw"}, {"role": "assistant", "content": b"x"}]]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, column 'messages': cannot be read: .*bytes"):
        load_rows(tmp_path / "a.parquet")


def test_columns_that_nothing_is_made_of_are_named_once(caplog):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "tools": [{"name": "t"}], "score": 1}] * 3)
    with caplog.at_level(logging.WARNING):
        prepare(rows, make_bpe(), source="mine")
    assert [r.getMessage() for r in caplog.records] == ["mine: not used: the columns 'score', 'tools'"]


def leaf(value):
    return talk(call("f", {"at": value}))


@pytest.mark.parametrize("value", [datetime.datetime(2024, 1, 2), decimal.Decimal("1.5"), b"raw"])
def test_values_that_json_lacks_are_refused_by_row_and_column(show, value):
    place = r"messages\[1\]\['tool_calls'\]\[0\]\['function'\]\['arguments'\]\['at'\] is " + type(value).__name__
    with pytest.raises(ValueError, match=rf"mine, row 2: {place}, which JSON has no form for"):
        prepare(Dataset.from_list([{"messages": leaf(None)}, {"messages": leaf(value)}]), show, source="mine")
    # Columns that are not for the template may hold what they like.
    rows = Dataset.from_list([{"messages": leaf("x"), "meta": [{"at": value}]}])
    assert len(prepare(rows, show, max_prompt_length=500, max_length=1000)) == 1


@pytest.mark.parametrize("result", [[], [1, 2], ["a"], [{"a": 1}]])
def test_a_tool_s_result_may_be_any_list(show, result):
    turns = [*talk(call("f", {})), {"role": "tool", "content": result}, {"role": "assistant", "content": "ok"}]
    dumped = [{"messages": json.dumps(turns)}]
    assert seen(dumped, show)[0][2]["content"] == result


TEXTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}" \
    "{% for p in m.content or [] %}{{ p.text if p.type == 'text' }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}" \
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"content": None, **{"tool_calls": [call("f", {})]}},
        {"content": None, "reasoning_content": "hm"},
        {"content": "", "reasoning_content": "hm"},
        {"content": "", "tool_calls": [call("f", {})]},
        {"content": [{"type": "refusal", "refusal": "no"}]},
        {"content": [{"type": "output_text", "text": "Paris"}]},
        {"content": ["Paris"]},
        {"content": [{"type": "text", "text": "So"}, {"type": "output_text", "text": "Paris"}]},
    ],
)
def test_a_last_turn_that_the_template_leaves_out_is_refused(turn):
    rows = [{"messages": json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", **turn}])}]
    with pytest.raises(ValueError, match="row 1: the chat template leaves out the .* of the last assistant turn"):
        prepare(rows, make_bpe(TEXTS, eos_token="<|im_end|>"))
