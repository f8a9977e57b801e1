"""Where a rendered conversation shows one of its turns, and whether it shows it at all: found by changing the turn."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from distillm_ext.data.chat.generation_marks import BEGIN, END
from distillm_ext.data.rows.checks import THOUGHT_KEYS, RowError, called_names, part_texts

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
Render = Callable[..., str]

# The start of a tag or special token, cut off.
_PARTIAL_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
# Nothing but white space and tags: all that a generation prompt may have beyond the rendered conversation.
_TAGS_ONLY = re.compile(r"(?:\s|</?[\w-]+>|\[/?[A-Z_]+\])*\Z")
_OPENING = re.compile(r"\s*(<|\[)([\w-]+)(>|\])\s*\Z")
_PROBE = BEGIN + END


def split_response(before: str, whole: str) -> tuple[str, str]:
    """(text between, response) for a generation prompt and a rendered conversation; see the docstring of `chat`.

    Raises:
        RowError: they differ in more than a thought.

    Example:
        >>> split_response("ask: <think>\\n", "ask: <think></think>yes")
        ('', '</think>yes')
    """
    if whole.startswith(before):
        return "", whole[len(before) :]
    common = len(_PARTIAL_TAG.sub("", os.path.commonprefix([before, whole])))
    rest, response = before[common:], whole[common:]
    if not _TAGS_ONLY.match(rest):
        raise RowError(
            "the chat template does not begin the conversation with the text it gives as generation prompt; use a "
            "template that does, or give prompt and completion as strings"
        )
    tags = rest.strip()
    if tags and tags in response:
        behind = response[response.index(tags) + len(tags) :]
        return "", behind.removeprefix(rest[len(rest.rstrip()) :])
    opening = _OPENING.match(rest)
    if opening is None:
        return "", response
    left, name, right = opening.groups()
    return f"\n{left}/{name}{right}\n\n", response.lstrip("\n")


def turn_range(render: Render, turns: Messages, index: int, whole: str, ends: str | None, *, shown: bool) -> Span:
    """Where `whole`, the rendered `turns`, shows the assistant turn `index`: what stands there from the generation
    prompt on, thought, text and calls, up to what ends the turn.

    Args:
        ends: what the template writes behind the text of a last turn, where that is known.
        shown: whether to refuse a turn of which the template shows nothing.

    Raises:
        RowError: the turn's part cannot be told, is missing, or is in pieces.
    """
    others = list(_others(turns[index]))
    changes = [_change(render, turns, index, other, whole) for other in others]
    if not shown and not any(changes):
        others = [{**turns[index], "content": _PROBE}]
        changes = [_change(render, turns, index, others[0], whole)]
    found = [change for change in changes if change]
    if not found:
        raise RowError(
            f"messages[{index}]: the chat template shows nothing of this turn, or not which part is its; leave out "
            "train and weight"
        )
    first = min(begin for begin, _ in found)
    end = _end(render, turns, index, whole, ends, list(zip(others, changes, strict=True)))
    follower = {**turns[index + 1], "content": _PROBE}
    behind = _change(render, turns, index + 1, follower, whole)
    if behind and behind[0] < end:
        raise RowError(
            f"messages[{index}]: the chat template shows this turn in pieces, with what follows it between; leave out "
            "train and weight, or give its text and its calls as two turns"
        )
    return min(_begin(render, turns, index, whole[:end], first), end), end


def check_shown(render: Render, turns: Messages, whole: str, response: str, ends: str | None) -> None:
    """Refuses a template that shows the last turn alike whatever its text, or its calls, or all it holds, are."""
    last = dict(turns[-1])
    calls = {key: last[key] for key in ("tool_calls", "function_call") if last.get(key)}
    silent = {key: value for key, value in last.items() if key not in (*calls, *THOUGHT_KEYS)} | {"content": ""}
    changed = [("text", {**last, "content": other}) for other in _other_contents(last.get("content"), response)]
    if "function_call" in calls or not all(name in response for name in called_names(last)):
        changed += [("tool calls", {k: v for k, v in last.items() if k != key}) for key in calls]
    said = part_texts(last.get("content"))
    holds = calls or any(last.get(key) for key in THOUGHT_KEYS) or any(text.strip() for text in said)
    if holds or last.get("content") != "":
        changed.append(("content", silent))
    for what, other in changed:
        if (what == "content" and _blank(response, ends)) or _same(render, [*turns[:-1], other], whole):
            form = " (it may want content as a list of parts, or as text)" if what != "tool calls" else ""
            raise RowError(
                f"the chat template leaves out the {what} of the last assistant turn{form}; use a template that has "
                "it, or remove the row"
            )


def _same(render: Render, turns: Messages, whole: str) -> bool:
    try:
        return render(turns) == whole
    except RowError:
        return False


def _blank(response: str, ends: str | None) -> bool:
    return not response.strip().removesuffix(ends or "").strip()


def _other_contents(content: Any, response: str) -> Iterator[Any]:
    """`content` with another text, for each text of it that `response` does not have."""
    if isinstance(content, str):
        text = content.rpartition("</think>")[2].strip()
        if text and text not in response:
            yield BEGIN
    if isinstance(content, list):
        for place, part in enumerate(content):
            texts = [text.rpartition("</think>")[2].strip() for text in part_texts([part])]
            if any(text and text not in response for text in texts):
                yield [*content[:place], _other_content(part), *content[place + 1 :]]


def _other_content(content: Any) -> Any:
    """Content of the same shape with other text."""
    if isinstance(content, list):
        return [_other_content(part) for part in content]
    if isinstance(content, Mapping):
        return {k: _PROBE if k != "type" and isinstance(v, str) else v for k, v in content.items()}
    return _PROBE


def _others(turn: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The turn with another of each thing that it holds: text, thoughts, and of its calls arguments and names."""
    held = False
    if any(text.strip() for text in part_texts(turn.get("content"))):
        held = True
        yield {**turn, "content": _other_content(turn["content"])}
    thoughts = {key: _PROBE for key in THOUGHT_KEYS if isinstance(turn.get(key), str) and turn[key].strip()}
    if thoughts:
        held = True
        yield {**turn, **thoughts}
        yield {key: value for key, value in turn.items() if key not in thoughts}
    calls = [call for call in turn.get("tool_calls") or [] if isinstance(call, Mapping)]
    if calls:
        yield {**turn, "tool_calls": [_other_call(call, "arguments") for call in calls]}
        yield {**turn, "tool_calls": [_other_call(call, "name") for call in calls]}
    elif not held:
        yield {**turn, "content": _PROBE}


def _other_call(call: Mapping[str, Any], key: str) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, Mapping):
        return {**call, "function": _other_call(inner, key)}
    if key == "name":
        return {**call, "name": _PROBE}
    other = {BEGIN: END}
    return {**call, key: json.dumps(other, ensure_ascii=False) if isinstance(call.get(key), str) else other}


def _change(render: Render, turns: Messages, index: int, other: Mapping[str, Any], whole: str) -> Span | None:
    """The range of `whole` that is another where turn `index` is `other`; None where nothing is."""
    try:
        shown = render([*turns[:index], other, *turns[index + 1 :]])
    except RowError:
        return None
    if shown == whole:
        return None
    begin = len(os.path.commonprefix([whole, shown]))
    return begin, max(begin, len(whole) - len(os.path.commonprefix([whole[::-1], shown[::-1]])))


def _end(
    render: Render, turns: Messages, index: int, whole: str, ends: str | None,
    changes: Sequence[tuple[Mapping[str, Any], Span | None]],
) -> int:  # fmt: skip
    """Where the turn ends: behind the last of it that changes, by what the template has there when it is last.

    The name of a call is looked at where nothing else tells: a template may show a result with it.
    """
    upto = turns[: index + 1]
    try:
        alone = render(upto)
    except RowError:
        return max(change[1] + _common(whole[change[1] :], ends or "") for _, change in changes if change)
    pairs = []
    for other, change in changes:
        last = _change(render, upto, index, other, alone)
        if change and last:
            pairs.append((called_names(other) == called_names(turns[index]), last[1], change[1]))
    if not pairs:
        return max(change[1] + _common(whole[change[1] :], ends or "") for _, change in changes if change)
    _, tail, place = max(pairs)
    return place + _common(whole[place:], alone[tail:])


def _begin(render: Render, turns: Messages, index: int, shown: str, first: int) -> int:
    """Where the turn begins in `shown`, which ends with it: behind the generation prompt, as that of a last turn.

    Args:
        first: the first place that changes with what the turn holds.
    """
    try:
        before = render(turns[:index], add_generation_prompt=True)
        history = render(turns[:index])
    except RowError:
        return first
    header = before[len(os.path.commonprefix([before, history])) :]
    stem = re.sub(r"(?:\s*</?[\w-]+>|\s*\[/?[A-Z_]+\])+\s*\Z", "", header).rstrip()
    place = shown.rfind(stem, 0, first) if stem else -1
    # The turns before may be shown otherwise now that others follow: then only the header of the turn is the same.
    for prompt, text in ((before, shown), *([(header, shown[place:])] if place >= 0 else [])):
        try:
            return len(shown) - len(split_response(prompt, text)[1])
        except RowError:
            continue
    return first


def _common(text: str, expected: str) -> int:
    """Length of what `text` begins with of `expected`, without a token that is cut off and white space at the end."""
    common = os.path.commonprefix([text, expected])
    return len((common if common == expected else _PARTIAL_TAG.sub("", common)).rstrip())
