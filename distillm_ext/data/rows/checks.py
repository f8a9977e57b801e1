"""What a row of text may hold, and what is wrong with one that cannot be used.

A row is one of

* an instruction row, `prompt` and `completion`: two strings, or two lists of messages;
* a conversation, `messages`: one list of messages that holds at least one assistant turn;
* a prompt alone, for policies that write the responses: `prompt`, or `messages` without an assistant turn;
* a tokenised row, `input_ids`, `loss_mask`, `prompt_length` (what `prepare_dataset` makes);
* plain text, `text`, for the language-modelling term.

A message is a mapping with a `role` and a `content`: a string, a list of text parts, or null beside what an assistant
turn holds instead (`tool_calls`, `reasoning_content`, ...). All other keys are for the chat template, but two also say
whether an assistant turn is a target: `train` (true or false) and `weight` (0 or 1). Beside a conversation, the columns
`tools`, `documents` and `chat_template_kwargs` are for the chat template too.

`check_row` says what is wrong with a row; whoever knows the file and the line adds them to the message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

TOKEN_COLUMNS = ("input_ids", "loss_mask", "prompt_length")
# What a chat template is given beside the messages.
TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
MESSAGE_COLUMNS = ("messages", "prompt", "completion")
KNOWN_COLUMNS = (*MESSAGE_COLUMNS, *TEMPLATE_COLUMNS, "text", *TOKEN_COLUMNS)
# Columns that are never plain text: where they hold a string, it is JSON.
PARSED_COLUMNS = ("messages", *TEMPLATE_COLUMNS)
# Arguments of `apply_chat_template` that are not the user's to set.
_RESERVED_KWARGS = (
    "conversation", "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens",
)  # fmt: skip
_MEDIA = ("image", "image_url", "audio", "input_audio", "video", "video_url", "file")
TOOL_ROLES = ("tool", "function", "ipython")
# What transformers and templates call the thought of a turn.
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
# What an assistant turn may hold in place of content.
_INSTEAD = ("tool_calls", "function_call", *THOUGHT_KEYS)


class RowError(ValueError):
    """A row that cannot be used; the message says what is wrong and what to do, not yet where."""


def check_row(row: Mapping[str, Any]) -> str:
    """Return the kind of `row`, "tokens", "completion", "messages", "prompt" or "text", or raise `RowError`."""
    if all(row.get(name) is not None for name in TOKEN_COLUMNS):
        _check_tokens(row)
        return "tokens"
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        _check_completion(prompt, completion)
        kind = "completion"
    elif row.get("messages") is not None:
        check_messages(row["messages"], "messages")
        kind = "messages" if any(message["role"] == "assistant" for message in row["messages"]) else "prompt"
    elif prompt is not None:
        if not isinstance(prompt, str):
            check_messages(prompt, "prompt")
        kind = "prompt"
    elif completion is not None:
        raise RowError("column 'prompt' is missing or null; a completion needs one")
    elif row.get("text") is not None:
        if not isinstance(row["text"], str):
            raise RowError(f"text must be a string, got {type_name(row['text'])}")
        return "text"
    else:
        raise RowError(
            "expected the columns 'prompt' and 'completion', or 'messages'; non-null columns found: "
            f"{', '.join(repr(name) for name, value in row.items() if value is not None) or 'none'}. Rename them, or "
            "map them with `columns`"
        )
    _check_template_columns(row)
    return kind


def check_response(row: Mapping[str, Any], kind: str) -> None:
    """Raise `RowError` for a row of a prompt alone."""
    if kind != "prompt":
        return
    talk = row.get("messages") is not None
    lacks = "messages has no assistant turn" if talk else "column 'completion' is missing or null"
    raise RowError(
        f"{lacks}, so there is no response to learn from; a prompt alone is enough for training rows of a policy whose "
        "steps all write their own (on_policy, batched_on_policy, teacher_responses; mixed with mixed_fraction 1; none "
        "with a warm-up)"
    )


def used_columns(row: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    """The columns that a row of this kind is made of."""
    if kind in ("tokens", "text"):
        return TOKEN_COLUMNS if kind == "tokens" else ("text",)
    if row.get("messages") is not None and kind != "completion":
        return ("messages", *TEMPLATE_COLUMNS)
    own = ("prompt", "completion") if kind == "completion" else ("prompt",)
    return own if isinstance(row["prompt"], str) else (*own, *TEMPLATE_COLUMNS)


def parsed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with the JSON text in `messages`, `tools`, `documents` and `chat_template_kwargs` parsed.

    Raises:
        RowError: such a column holds text that is no JSON.
    """
    parsed = dict(row)
    for name in PARSED_COLUMNS:
        if isinstance(parsed.get(name), str):
            parsed[name] = _parsed(parsed[name], name)
    if isinstance(parsed.get("tools"), list):
        tools = enumerate(parsed["tools"])
        parsed["tools"] = [_parsed(t, f"tools[{i}]") if isinstance(t, str) else t for i, t in tools]
    return parsed


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        kind = "a mapping" if name == "chat_template_kwargs" else "a list"
        raise RowError(f"{name} must be {kind}, or its JSON text, got str that is no JSON: {error}") from error


def check_messages(messages: Any, column: str) -> None:
    """Raise `RowError` unless `messages` is a non-empty list of messages."""
    if not isinstance(messages, list):
        raise RowError(f"{column} must be a list of {{'role', 'content'}} messages, got {type_name(messages)}")
    if not messages:
        raise RowError(f"{column} is an empty list; it needs at least one message, or remove the row")
    for index, message in enumerate(messages):
        place = f"{column}[{index}]"
        if not isinstance(message, Mapping):
            raise RowError(f"{place} must be a mapping with role and content, got {type_name(message)}")
        if not isinstance(message.get("role"), str):
            raise RowError(f"{place}['role'] must be a string, got {type_name(message.get('role'))}")
        _check_content(message, f"{place}['content']")
        _check_calls(message.get("tool_calls"), f"{place}['tool_calls']")
        turn_flag(message, place)


def _check_content(message: Mapping[str, Any], place: str) -> None:
    content, role = message.get("content"), message["role"]
    if isinstance(content, str) or (role in TOOL_ROLES and content is not None and not isinstance(content, list)):
        return  # a tool's result may be any value; the template writes it out
    if isinstance(content, list):
        for index, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in _MEDIA:
                raise RowError(f"{place}[{index}] is a part of type {kind!r}; only text can be trained on")
            if role not in TOOL_ROLES and not isinstance(part, (Mapping, str)):
                raise RowError(f"{place}[{index}] must be a mapping such as a text part, got {type_name(part)}")
        return
    if content is None and role == "assistant" and any(message.get(key) for key in _INSTEAD):
        return
    raise RowError(
        f"{place} must be a string, got {type_name(content)}; a list of text parts is legal too, and null beside the "
        f"{', '.join(_INSTEAD)} of an assistant"
    )


def _check_mappings(value: Any, place: str) -> None:
    """A list of mappings, or None."""
    if not isinstance(value, list | None):
        raise RowError(f"{place} must be a list of mappings, got {type_name(value)}; parse it where it is JSON text")
    for index, entry in enumerate(value or []):
        if not isinstance(entry, Mapping):
            raise RowError(f"{place}[{index}] must be a mapping, got {type_name(entry)}")


def _check_calls(calls: Any, place: str) -> None:
    _check_mappings(calls, place)
    for index, call in enumerate(calls or []):
        inner = [call, *(value for value in call.values() if isinstance(value, Mapping))]
        if not any(isinstance(part.get("name"), str) and part["name"] for part in inner):
            raise RowError(f"{place}[{index}] names no tool; give {{'function': {{'name': ..., 'arguments': ...}}}}")


def turn_flag(message: Mapping[str, Any], place: str) -> bool | None:
    """What a message says of being a target: True, False, or None where it has neither `train` nor `weight`.

    Raises:
        RowError: a `train` that is no boolean, a `weight` that is neither 0 nor 1, or the two contradict each other.
    """
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{place}['train'] must be true or false, got {train!r}")
    if weight is None:
        return train
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{place}['weight'] must be 0 or 1, got {weight!r}; fractions of a turn are not supported")
    if train is not None and train != bool(weight):
        raise RowError(f"{place} has weight {weight!r} and train {train!r}, which contradict each other; leave out one")
    return bool(weight)


def part_texts(content: Any) -> list[str]:
    """The texts of a content, whatever its parts call them."""
    parts = content if isinstance(content, list) else [content]
    found: list[str] = []
    for part in parts:
        values = [v for key, v in part.items() if key != "type"] if isinstance(part, Mapping) else [part]
        found += [value for value in values if isinstance(value, str)]
    return found


def message_texts(message: Mapping[str, Any]) -> list[str]:
    """The text of a message, without a thought before it."""
    return [text.rpartition("</think>")[2] for text in part_texts(message.get("content"))]


def called_names(message: Mapping[str, Any]) -> list[str]:
    """The names of the tools that a message calls."""
    calls = [call for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
    functions = [call.get("function", call) for call in calls]
    return [f["name"] for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)]


def check_template_kwargs(value: Any, name: str) -> None:
    """Raise `RowError` unless `value` is a mapping of arguments that a chat template may be given."""
    if not isinstance(value, Mapping):
        raise RowError(f"{name} must be a mapping, got {type_name(value)}")
    for key in value:
        if not isinstance(key, str) or key in _RESERVED_KWARGS:
            raise RowError(f"{name}: {key!r} is no argument of a chat template that can be set; leave it out")


def checked_template_kwargs(value: Any) -> dict[str, Any]:
    """The setting `chat_template_kwargs`: a mapping, its JSON text, or None for an empty one.

    Raises:
        TypeError, ValueError: it is something else, or names an argument that cannot be set.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"chat_template_kwargs: expected a mapping or its JSON text, got {value!r}") from error
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"chat_template_kwargs: expected a mapping, got {value!r} ({type_name(value)})")
    check_template_kwargs(value or {}, "chat_template_kwargs")
    return dict(value or {})


def _check_template_columns(row: Mapping[str, Any]) -> None:
    for name in ("tools", "documents"):
        _check_mappings(row.get(name), name)
    if row.get("chat_template_kwargs") is not None:
        check_template_kwargs(row["chat_template_kwargs"], "chat_template_kwargs")


def _check_completion(prompt: Any, completion: Any) -> None:
    if isinstance(prompt, str) and isinstance(completion, str):
        return
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError(
            "prompt and completion must be of one kind, two strings or two lists of messages, got "
            f"{type_name(prompt)} and {type_name(completion)}"
        )
    check_messages(prompt, "prompt")
    check_messages(completion, "completion")
    if not any(message["role"] == "assistant" for message in completion):
        raise RowError("completion has no assistant turn, so nothing to learn; add one or remove the row")


def _check_tokens(row: Mapping[str, Any]) -> None:
    ids, mask, prompt_length = (row[name] for name in TOKEN_COLUMNS)
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise RowError("input_ids and loss_mask must be lists of one length")
    if not set(map(type, ids)) <= {int}:
        wrong = next(value for value in ids if type(value) is not int)
        raise RowError(f"input_ids must hold integers, got {wrong!r}")
    if not (set(map(type, mask)) <= {int, bool} and set(mask) <= {0, 1}):
        wrong = next(value for value in mask if type(value) not in (int, bool) or value not in (0, 1))
        raise RowError(f"loss_mask must hold 0 and 1, got {wrong!r}")
    if isinstance(prompt_length, bool) or not isinstance(prompt_length, int):
        raise RowError(f"prompt_length must be an integer, got {type_name(prompt_length)}")
    if not 1 <= prompt_length <= len(ids):
        raise RowError(f"prompt_length must be in 1..{len(ids)} (length of input_ids), got {prompt_length}")


def type_name(value: Any) -> str:
    """The name of a value's type as a reader of JSON knows it."""
    return "null" if value is None else type(value).__name__
