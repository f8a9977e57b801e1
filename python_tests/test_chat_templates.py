"""The chat templates that TRL ships, and what a template may do to prompt and response."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import pytest
from data_world import TALK, make_bpe

from distillm_ext.data.chat.templates import split_response
from distillm_ext.data.row_tokens import RowTokenizer
from distillm_ext.data.rows.checks import RowError

_TRL = importlib.util.find_spec("trl")
FILES = sorted((Path(_TRL.submodule_search_locations[0]) / "chat_templates").glob("*.jinja")) if _TRL else []
USER, CALL = {"role": "user", "content": "hello"}, {"name": "bell", "arguments": {"x": 1}}
TURN = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}], "content": ""}
RANG = {"role": "tool", "name": "bell", "content": "rang", "tool_call_id": "abcdefghi"}
KINDS = {
    "simple": [USER, {"role": "assistant", "content": "world"}],
    "multi": [USER, {"role": "assistant", "content": "world"}, {"role": "user", "content": "again"},
              {"role": "assistant", "content": "the end"}],
    "thought": [USER, {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nworld"}],
    "field": [USER, {"role": "assistant", "content": "world", "reasoning_content": "hmm"}],
    "answered call": [USER, TURN, RANG, {"role": "assistant", "content": "done"}],
    "call": [USER, TURN],
    "parts": [{**USER, "content": [{"type": "text", "text": "hello"}]},
              {"role": "assistant", "content": [{"type": "text", "text": "world"}]}],
}  # fmt: skip
PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
# Why a template refuses a conversation: its own words, or ours for what it cannot show.
REFUSALS = "must alternate|can only concatenate|no element 0|has no attribute|leaves out the|prints lists of parts"


@functools.cache
def special_tokens():
    texts = "".join(file.read_text() for file in FILES)
    return sorted({*re.findall(r"<[|｜][A-Za-z_▁0-9]+[|｜]>", texts), "<end_of_turn>", "<end_of_utterance>", "<turn|>"})


def tokenizer_for(template):
    tokenizer = make_bpe(template, eos_token="<eos>", bos_token="<bos>")
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens()})
    return tokenizer


def exchange(tokenizer, messages, **options):
    row = RowTokenizer(tokenizer, max_prompt_length=4000, max_length=8000, **options)({"messages": messages})
    learnt = [token for token, flag in zip(row.input_ids, row.loss_mask, strict=True) if flag]
    parts = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :], learnt
    return [tokenizer.decode(part) for part in parts], row


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_templates(file):
    text = file.read_text()
    tokenizer = tokenizer_for(text)
    marked = re.search(r"\{%-?\s*generation", text)
    for kind, messages in KINDS.items():
        try:
            (prompt, response, learnt), row = exchange(tokenizer, messages)
        except RowError as error:
            parts_only = file.stem.removesuffix("_training") in PARTS_ONLY
            assert re.search(REFUSALS, str(error)), (kind, error)
            assert kind in ("answered call", "call", "parts") or parts_only, (kind, error)
            assert not (kind == "parts" and parts_only), error
            continue
        wanted = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert prompt == wanted, kind
        said = {"multi": "the end", "answered call": "done", "call": "bell"}.get(kind, "world")
        assert said in response and said in learnt, (kind, response, learnt)
        assert not re.search("hello|again|rang", learnt), (kind, learnt)
        assert "[{'type'" not in prompt + response
        assert row.input_ids[-1] in tokenizer.all_special_ids, (kind, response)
        if kind == "multi":
            assert ("world" in learnt) == bool(marked), learnt
        reasons = kind in ("thought", "field") and "hmm" not in response
        assert row.left_out[2] == reasons, (kind, response)


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_flagged_call_is_in_the_targets_or_out_of_them(file, flag):
    """With marks or without, and also where a template shows a result otherwise once its call is another."""
    tokenizer, turns = tokenizer_for(file.read_text()), KINDS["answered call"]
    try:
        shows = "bell" in tokenizer.apply_chat_template(turns, tokenize=False)
        (_, _, whole), _ = exchange(tokenizer, turns)
    except Exception:  # the template has no form for it, which the test above looks at
        return
    try:
        (_, _, learnt), _ = exchange(tokenizer, [USER, {**TURN, "weight": flag}, *turns[2:]])
    except RowError as error:
        assert "shows nothing of this turn" in str(error) and flag and not shows
        return
    assert "done" in learnt and not re.search("hello|rang", learnt)
    assert ("bell" in learnt) == bool(flag and shows), learnt
    assert flag == 0 or len(learnt) >= len(whole)


THOUGHTS = {
    "field": {**TURN, "content": "let me", "reasoning_content": "hmm"},
    "thought": {**TURN, "content": "<think>\nhmm\n</think>\n\nlet me"},
}


@pytest.mark.parametrize("kind", THOUGHTS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_flagged_call_is_learnt_with_its_thought_and_text(file, kind):
    """All that the template shows of the turn, or a refusal; as for a last turn, no thought that the prompt closes."""
    tokenizer, turns = tokenizer_for(file.read_text()), [USER, THOUGHTS[kind], RANG, KINDS["answered call"][-1]]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        exchange(tokenizer, turns)
    except Exception:  # the template has no form for it, which the first test looks at
        return
    try:
        (_, _, learnt), _ = exchange(tokenizer, [USER, {**THOUGHTS[kind], "weight": 1}, *turns[2:]])
    except RowError as error:
        assert "in pieces" in str(error) and whole.index("rang") < whole.index("let me")
        return
    closed = "</think>" in tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    for said in ("let me", "bell", *(() if closed else ("hmm",))):
        assert (said in learnt) == (said in whole.replace("tool bell", "")), (said, learnt)
    assert not re.search("hello|rang", learnt), learnt
    # The same in a conversation that goes on, where templates take thoughts out of the turns before.
    later = [*turns, {"role": "user", "content": "again"}, {"role": "assistant", "content": "bye"}]
    whole = tokenizer.apply_chat_template(later, tokenize=False)
    (_, _, learnt), _ = exchange(tokenizer, [USER, {**THOUGHTS[kind], "weight": 1}, *later[2:]])
    assert all(said in learnt for said in ("let me", "bell") if said in whole), learnt
    assert closed or ("hmm" in learnt) == ("hmm" in whole), learnt
    assert not re.search("hello|rang|again", learnt), learnt


def test_a_flagged_turn_behind_thoughts_that_the_whole_conversation_has_lost():
    """The generation prompt of the turn shows them: its place is found by its own header."""
    template = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 "
        "%}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and "
        "loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_bpe(template, eos_token="<|im_end|>")
    thought = {"role": "assistant", "content": "one", "reasoning_content": "hmm"}
    turns = [USER, thought, {"role": "tool", "content": "rang"}, {**thought, "content": "two", "weight": 1}, USER,
             {"role": "assistant", "content": "three"}]  # fmt: skip
    assert exchange(tokenizer, turns)[0][2] == "two<|im_end|>three<|im_end|>"


@pytest.mark.parametrize(
    ("before", "whole", "bridge", "response"),
    [
        ("q: ", "q: a", "", "a"),
        ("q:<think>\n", "q:<think></think>a", "", "</think>a"),
        ("q:<think>\n", "q:a<e>", "\n</think>\n\n", "a<e>"),
        ("q:<think>\n", "q:<eos>", "\n</think>\n\n", "<eos>"),
        ("q:[THINK]", "q:\n\na", "\n[/THINK]\n\n", "a"),
        ("q:<think>\n\n</think>\n\n", "q:<think>\nhm\n</think>\n\na", "", "a"),
        ("q:<think>\n\n</think>\n\n", "q:a", "", "a"),
    ],
)
def test_prompt_and_response_where_the_generation_prompt_opens_a_thought(before, whole, bridge, response):
    assert split_response(before, whole) == (bridge, response)


def test_the_bridge_is_context_and_no_target():
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = make_bpe(template, eos_token="<|im_end|>")
    (prompt, response, learnt), _ = exchange(tokenizer, TALK[:2])
    assert prompt.endswith("<think>\n")
    assert response == "\n</think>\n\nworld<|im_end|>" and learnt == "world<|im_end|>"


@pytest.mark.parametrize("end", ["", "\n", "\n### "])
def test_a_response_that_the_template_does_not_end_gets_eos(end):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}" + end + "{% endfor %}"
    tokenizer = make_bpe(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    (_, response, learnt), _ = exchange(tokenizer, TALK)
    assert response == learnt == f"the end{end}<eos>"
    if not end.strip():  # a special token of the text is no end of the turn
        (_, response, _), _ = exchange(tokenizer, [TALK[0], {**TALK[1], "content": "the<|im_start|>"}])
        assert response == f"the<|im_start|>{end}<eos>"
    tokenizer.eos_token = None
    with pytest.raises(RowError, match="set tokenizer.eos_token"):
        exchange(tokenizer, TALK)


def test_marks_inside_indented_blocks_are_found():
    template = (
        "{%- for m in messages %}\n    {%- if m['role'] == 'assistant' %}\n    {% generation %}\n    {{ m['content'] }}"
        "<|im_end|>\n    {% endgeneration %}\n    {%- else %}\n{{ m['content'] }}:\n    {%- endif %}\n{%- endfor %}"
    )
    tokenizer = make_bpe(template, eos_token="<|im_end|>")
    plain = make_bpe(re.sub(r"\{% (end)?generation %\}", "{% if true %}", template).replace(
        "<|im_end|>\n    {% if true %}", "<|im_end|>\n    {% endif %}"), eos_token="<|im_end|>")  # fmt: skip
    (_, _, learnt), row = exchange(tokenizer, TALK)
    assert re.sub(r"\s+", " ", learnt) == " world<|im_end|> the end<|im_end|>"
    assert row.input_ids == exchange(plain, TALK)[1].input_ids
