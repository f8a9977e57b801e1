"""What a row gives its chat template beside the messages, which turns are targets, what limits and templates take."""

from __future__ import annotations

import json
import logging

import pytest
from data_world import CHATML, MARKED, TALK, make_bpe, prepare, targets
from datasets import Dataset, load_from_disk

from distillm_ext.data.rows.loading import load_rows
from distillm_ext.runs.capture import CaptureSettings, token_rows
from distillm_ext.runs.settings import DatasetSettings
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.splits import prepare_train

LISTED = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}{{ documents | tojson }}<|im_end|>\n{% endif %}"
THINK = CHATML.removesuffix("{% endif %}") + "{% if think is defined %}{{ think }}{% endif %}{% endif %}"
TOOLS = [{"name": "bell", "parameters": {"b": 1, "a": None}}]
LONG = [*TALK[:3], {"role": "assistant", "content": "the end"}]


def prompt_of(row, tokenizer):
    return tokenizer.decode(row["input_ids"][: row["prompt_length"]])


@pytest.mark.parametrize("form", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]])
def test_tools_and_documents_reach_the_template(form):
    tokenizer = make_bpe(LISTED + CHATML, eos_token="<|im_end|>")
    row = prepare([{"messages": TALK, "tools": form, "documents": [{"text": "d"}]}], tokenizer, max_prompt_length=200)[
        0
    ]
    shown = '[{"name": "bell", "parameters": {"b": 1, "a": null}}][{"text": "d"}]'
    if form is TOOLS:  # Arrow's structs do not tell a key that is null from one that is not there
        shown = shown.replace(', "a": null', "")
    assert shown in prompt_of(row, tokenizer)


def test_a_row_s_template_kwargs_win_over_the_setting():
    tokenizer = make_bpe(THINK, eos_token="<|im_end|>")
    rows = [{"messages": TALK, "chat_template_kwargs": json.dumps({"think": "<own></own>"})}, {"messages": TALK}]
    found = prepare(rows, tokenizer, chat_template_kwargs={"think": "<all></all>"})
    assert [prompt_of(row, tokenizer).rpartition("\n")[2] for row in found] == ["<own></own>", "<all></all>"]


@pytest.mark.parametrize(
    ("given", "error"), [({"tools": []}, "'tools'"), ("think", "JSON text"), ([1], "expected a mapping")]
)
def test_bad_template_kwargs_are_refused_by_the_configuration(tmp_path, given, error):
    with pytest.raises((TypeError, ValueError), match=f"chat_template_kwargs.*{error}"):
        DistillationConfig(output_dir=str(tmp_path), use_cpu=True, chat_template_kwargs=given)


def test_capture_makes_the_rows_of_training(tmp_path):
    path, think = tmp_path / "rows.jsonl", {"think": "<x></x>"}
    path.write_text(json.dumps({"messages": TALK}))
    tokenizer = make_bpe(THINK, eos_token="<|im_end|>")
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, chat_template_kwargs=think)
    trained = prepare_train(load_rows(path), tokenizer, args).remove_columns("row")
    source = DatasetSettings(train=str(path))
    options = dict(teacher="x", dataset=source, out=tmp_path / "cache", max_prompt_length=256, max_length=512)
    assert token_rows(CaptureSettings(**options, chat_template_kwargs=json.dumps(think)), tokenizer)[:] == trained[:]
    assert token_rows(CaptureSettings(**options), tokenizer)[:] != trained[:]


def test_named_templates_and_a_tokenizer_without_any():
    named = {"default": CHATML, "tool_use": "tools! " + CHATML}
    tokenizer = make_bpe(named, eos_token="<|im_end|>")
    rows = prepare([{"messages": TALK, "tools": None}, {"messages": TALK, "tools": TOOLS}], tokenizer)
    assert [prompt_of(row, tokenizer).startswith("tools!") for row in rows] == [False, True]
    with pytest.raises(ValueError, match="row 1: chat_template: .*rag"):
        prepare([{"messages": TALK}], make_bpe({"rag": CHATML}))
    text = [{"prompt": "hello", "completion": "world"}]
    assert prepare(text, make_bpe({"rag": CHATML}))[:] == prepare(text, make_bpe())[:]


# ---- which turns are targets

PLAIN, MARKS = make_bpe(CHATML, eos_token="<|im_end|>"), make_bpe(MARKED, eos_token="<|im_end|>")
FLAGS = [
    # first turn, last turn, targets without marks, with marks
    ({}, {}, "the end<|im_end|>", "world<|im_end|>the end<|im_end|>"),
    ({"weight": 1}, {"weight": 1}, "world<|im_end|>the end<|im_end|>", "world<|im_end|>the end<|im_end|>"),
    ({"train": True}, {}, "world<|im_end|>the end<|im_end|>", "world<|im_end|>the end<|im_end|>"),
    ({"weight": 0.0}, {"weight": 1.0}, "the end<|im_end|>", "the end<|im_end|>"),
    ({"train": False}, {"train": True, "weight": 1}, "the end<|im_end|>", "the end<|im_end|>"),
    ({}, {"weight": 0}, "world<|im_end|>", "world<|im_end|>"),
]


@pytest.mark.parametrize(("first", "last", "plain", "marked"), FLAGS)
def test_weight_and_train_say_which_turns_are_targets(first, last, plain, marked):
    rows = [{"messages": [LONG[0], {**LONG[1], **first}, LONG[2], {**LONG[3], **last}]}]
    for tokenizer, expected in ((PLAIN, plain), (MARKS, marked)):
        row = prepare(rows, tokenizer)[0]
        assert tokenizer.decode(targets(row)) == expected
        # The prompt of the row is that of its last target.
        shown = LONG[:1] if "end<" not in expected.replace("_end", "") else LONG[:3]
        assert prompt_of(row, tokenizer) == tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.parametrize("flagged", [(0,), (1,), (0, 1), ()])
def test_a_flag_puts_a_turn_in_that_the_marks_pass_over(flagged):
    """The marks of this template are only around the word "end"."""
    text = "{{ m['content'] }}<|im_end|>"
    marks = "{% if 'end' in m['content'] %}the {% generation %}end{% endgeneration %}<|im_end|>{% else %}" + text
    tokenizer = make_bpe(CHATML.replace(text, marks + "{% endif %}"), eos_token="<|im_end|>")
    turns = [{**LONG[i], "train": True} if i in {2 * f + 1 for f in flagged} else LONG[i] for i in range(4)]
    wanted = ("world<|im_end|>" if 0 in flagged else "") + ("the end<|im_end|>" if 1 in flagged else "end")
    learnt = tokenizer.decode(targets(prepare([{"messages": turns}], tokenizer)[0]))
    assert learnt.replace(" end", "end") == wanted.replace(" end", "end")


def test_the_end_of_a_turn_is_looked_up_for_the_options_of_the_row():
    """One template with two ends: what an end is follows the row's own option."""
    template = CHATML.replace("<|im_end|>", "{{ stop }}").replace("<|im_start|>", "#")
    tokenizer = make_bpe(template)
    tokenizer.add_tokens(["<s1>", "<s2>"])
    rows = [{"messages": TALK[:2], "chat_template_kwargs": json.dumps({"stop": s})} for s in ("<s1>", "", "<s2>")]
    found = [tokenizer.decode(targets(row)) for row in prepare(rows, tokenizer)]
    assert found == ["world<s1>", "world\n<eos>", "world<s2>"]


def test_a_target_that_the_template_shows_otherwise_once_turns_follow():
    """The last turn gets a thought that earlier ones lose: the earlier one is found all the same."""
    thought = CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}<t></t>{% endif %}{{ m['content'] }}"
    )
    tokenizer = make_bpe(thought, eos_token="<|im_end|>")
    rows = [{"messages": [LONG[0], {**LONG[1], "weight": 1}, *LONG[2:]]}]
    assert tokenizer.decode(targets(prepare(rows, tokenizer)[0])) == "world<|im_end|><t></t>the end<|im_end|>"


def test_no_turn_to_learn_is_refused_by_row():
    with pytest.raises(ValueError, match="row 1: weight 0 or train false at every assistant turn"):
        prepare([{"messages": [TALK[0], {**TALK[1], "weight": 0}]}], PLAIN)


# ---- counts, and results that were kept


def test_what_limits_cut_is_counted(caplog):
    rows = [
        {"prompt": "hello the end of it", "completion": "x"},
        {"prompt": "hello", "completion": "the end of it the end"},
        {"prompt": "hello", "completion": "world"},
    ]
    with caplog.at_level(logging.WARNING):
        prepare(rows, make_bpe(), max_prompt_length=3, max_length=8, source="train.jsonl")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("train.jsonl: the limit max_prompt_length=3 cuts the beginning of the prompt")
    assert lines[1].startswith("train.jsonl: the limit max_length=8 cuts the end of the response")
    assert all("of 1 of 3 rows; raise it" in line for line in lines), lines


def test_what_the_template_leaves_out_is_counted(caplog):
    no_system = CHATML.replace("{{ m['content'] }}", "{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}")
    turns = [{"role": "system", "content": "be kind"}, TALK[0], {**TALK[1], "reasoning_content": "because"}]
    with caplog.at_level(logging.WARNING):
        prepare([{"messages": turns}], make_bpe(no_system, eos_token="<|im_end|>"), source="x")
    assert [record.getMessage() for record in caplog.records] == [
        "x: the chat template leaves out text of a message in 1 of 1 rows",
        "x: the chat template leaves out the reasoning of the last turn in 1 of 1 rows",
    ]


def test_kept_results_serve_the_same_settings_only(tmp_path, caplog):
    Dataset.from_list([{"messages": TALK}]).save_to_disk(tmp_path / "rows")

    def made(template=CHATML, **options):
        rows = prepare(load_from_disk(tmp_path / "rows"), make_bpe(template, eos_token="<|im_end|>"), **options)
        return rows[0]["input_ids"], {file["filename"] for file in rows.cache_files}

    first = made()
    assert first[1] and made() == first
    files = [first[1]]
    others = [dict(template=CHATML.replace("['content'] }}", "['content'] }}!")), dict(template=THINK)]
    others += [dict(chat_template_kwargs={"think": "<x>"}), dict(prompts_only=True)]
    for other in (*others, dict(max_length=100), dict(max_prompt_length=5)):
        files.append(made(**other)[1])
    assert len({frozenset(found) for found in files}) == len(files)
    # The counts are told again where the rows are not made again.
    caplog.clear()
    made(max_prompt_length=5)
    assert "max_prompt_length=5 cuts" in caplog.text
