"""Conversations through a chat template: the text of the prompt, of the response, and which of it is a target.

The prompt is what the template gives for generation, G = render(turns before, add_generation_prompt): so a response
generated from the prompt's tokens stands where the one of the data stood. The response is the rest of the rendered
conversation W = render(turns up to the response) after the common prefix of G and W. Mostly G is a prefix of W. Where
the generation prompt opens a thought that W shows differently,

* what W has after the border of both is the response (G `<think>\\n`, W `<think></think>text`);
* where G closes the thought too, the response is what follows the closed thought in W;
* where W has no thought at all, a closing tag is put between, as context and not as a target: the answer stands behind
  an empty thought, as templates with an empty thought write it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from distillm_ext.training.generation_marks import BEGIN, END, MARK, marked_spans, with_marks
from distillm_ext.training.row_checks import RowError, called_names, message_texts, template_advice, turn_flag

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

# The start of a tag or special token, cut off.
_PARTIAL_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
# Nothing but white space and tags: all that a generation prompt may have beyond the rendered conversation.
_TAGS_ONLY = re.compile(r"(?:\s|</?[\w-]+>|\[/?[A-Z_]+\])*\Z")
_OPENING = re.compile(r"\s*(<|\[)([\w-]+)(>|\])\s*\Z")
_PROBE = "a3f0c1d"


@dataclass(frozen=True)
class Exchange:
    """A prompt and its response as text.

    Attributes:
        prompt: what the template gives for generation.
        bridge: text between prompt and response that is no target, mostly none.
        response: the rest, up to the end of the turn.
        targets: character ranges of prompt + bridge + response that are targets; None is the whole response.
        ends: text that the template puts behind a turn; "" where it puts none, None where that is not known.
        turns: the messages that are shown, the last of which is the response.
    """

    prompt: str
    bridge: str
    response: str
    targets: list[Span] | None
    ends: str | None
    turns: Messages


class Conversations:
    """Renders the conversations of rows with a tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer. Its template is looked at when a row needs it.
        settings: arguments for the template of every row; a row's own win.
    """

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.settings = dict(settings)
        self._ends: dict[str, str | None] = {}

    def prompt(self, messages: Messages, row: Mapping[str, Any]) -> str:
        """The text that a response to `messages` is generated from."""
        return _Renderer(self.tokenizer, self.settings, row)(messages, add_generation_prompt=True)

    def exchange(self, messages: Messages, first_target: int, row: Mapping[str, Any]) -> Exchange | None:
        """The conversation up to its last target, which is an assistant turn.

        Args:
            messages: the conversation.
            first_target: message from which on there are targets.
            row: its `tools`, `documents` and `chat_template_kwargs` go to the template.

        Returns:
            None where the data says of every assistant turn that it is no target.

        Raises:
            RowError: the template refuses the conversation, or has no form from which prompt and response can be told.
        """
        render = _Renderer(self.tokenizer, self.settings, row)
        flags = [_flag(message, index, first_target) for index, message in enumerate(messages)]
        last = max((index for index, flag in enumerate(flags) if flag is not False), default=None)
        if last is None:
            return None
        if last == 0:
            raise RowError("the only assistant turn is the first message, so there is no prompt; add a user turn")
        turns = messages[: last + 1]
        before, whole = render(messages[:last], add_generation_prompt=True), render(turns)
        bridge, response = split_response(before, whole)
        _check_shown(render, turns, whole, response)
        begin, ends = len(whole) - len(response), self._end_of_turn(render)

        def ranges(flag: bool) -> list[Span]:
            places = [i for i in range(last) if messages[i]["role"] == "assistant" and flags[i] is flag]
            return [_turn_range(render, turns, place, whole, ends) for place in places]

        # Marks become a mask through character offsets, which only tokenizers of the `tokenizers` library have.
        if render.has_marks and self.tokenizer.is_fast:
            spans: list[Span] | None = _marked(render, turns, ranges(False), whole)
        elif any(flags[:last]):
            if not self.tokenizer.is_fast:
                raise RowError(
                    "targets before the last assistant turn need a fast tokenizer; leave out train and weight"
                )
            spans = [*ranges(True), (begin, len(whole))]
        else:
            spans = None
        if spans is not None:
            spans = _moved(spans, begin, len(before) + len(bridge) - begin)
        return Exchange(before, bridge, response, spans, ends, turns)

    def _end_of_turn(self, render: _Renderer) -> str | None:
        """What the template writes behind the text of a last assistant turn, by trying it."""
        if render.template not in self._ends:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
            try:
                text, found, end = render(probe).rpartition(_PROBE)
            except RowError:
                found = ""
            self._ends[render.template] = end.strip() if found else None
        return self._ends[render.template]


class _Renderer:
    """A template with the arguments of one row."""

    def __init__(self, tokenizer: Any, settings: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.options = {**settings, **(row.get("chat_template_kwargs") or {})}
        # An empty list says that there are no tools; templates tell by null.
        self.options |= {name: row.get(name) or None for name in ("tools", "documents")}
        named = self.options.pop("chat_template", None)
        if named is None and getattr(tokenizer, "chat_template", None) is None:
            raise RowError(
                "the row is a conversation and the tokenizer has no chat template; set tokenizer.chat_template, "
                "or give prompt and completion as strings"
            )
        try:
            self.template: str = tokenizer.get_chat_template(named, self.options["tools"])
        except ValueError as error:
            raise RowError(f"chat_template: {error}") from error
        self.has_marks = bool(MARK.search(self.template))

    def __call__(self, messages: Messages, *, add_generation_prompt: bool = False, marked: bool = False) -> str:
        template = with_marks(self.template) if marked else self.template
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=template, tokenize=False,
                add_generation_prompt=add_generation_prompt, **self.options,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowError(f"the chat template rejects the conversation: {error}{template_advice(messages)}") from error
        if any(isinstance(message.get("content"), list) and str(message["content"]) in text for message in messages):
            raise RowError("the chat template prints lists of parts as they stand in Python; give content as text")
        return text


def split_response(before: str, whole: str) -> tuple[str, str]:
    """(text between, response) for a generation prompt and a rendered conversation; see the module's docstring.

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


def _check_shown(render: _Renderer, turns: Messages, whole: str, response: str) -> None:
    """Refuses a template that shows the response alike whatever its text, or its tool calls, are."""
    last = dict(turns[-1])
    texts = [text.strip() for text in message_texts(last) if text.strip()]
    changed = {}
    if texts and not any(text in response for text in texts):
        as_parts = isinstance(last["content"], list)
        changed["text"] = {**last, "content": [{"type": "text", "text": BEGIN}] if as_parts else BEGIN}
    if not all(name in response for name in called_names(last)):
        changed["tool calls"] = {key: value for key, value in last.items() if key != "tool_calls"}
    for what, other in changed.items():
        try:
            same = render([*turns[:-1], other]) == whole
        except RowError:
            continue
        if same:
            form = " (it may want content as a list of parts, or as text)" if what == "text" else ""
            raise RowError(
                f"the chat template leaves out the {what} of the last assistant turn{form}; use a template that has "
                "them, or remove the row"
            )


def _flag(message: Mapping[str, Any], index: int, first_target: int) -> bool | None:
    if message["role"] != "assistant" or index < first_target:
        return False
    return turn_flag(message, f"messages[{index}]")


def _marked(render: _Renderer, turns: Messages, unwanted: Sequence[Span], whole: str) -> list[Span]:
    """Character ranges of `whole` inside generation marks, without those of turns that are no targets."""
    spans = marked_spans(render(turns, marked=True), whole)
    return [span for span in spans if not any(span[0] < right and left < span[1] for left, right in unwanted)]


def _turn_range(render: _Renderer, turns: Messages, index: int, whole: str, ends: str | None) -> Span:
    """Where `whole` shows text and calls of the assistant turn `index`, and what ends it: what changes with them. Where
    a result needs its call, the call changes its name."""
    turn = {**turns[index], "content": BEGIN + END}
    silent = {key: value for key, value in turn.items() if key != "tool_calls"}
    renamed = {**turns[index], "tool_calls": [_renamed(call) for call in turn.get("tool_calls") or []]}
    for other in (silent, renamed):
        try:
            shown = render([*turns[:index], other, *turns[index + 1 :]])
        except RowError:
            continue
        begin = len(os.path.commonprefix([whole, shown]))
        end = max(begin, len(whole) - len(os.path.commonprefix([whole[::-1], shown[::-1]])))
        end += _common(whole[end:], ends or "")
        if renamed["tool_calls"]:
            # A template may show a result otherwise where its call is another: take the turn as it is when last.
            alone = render(turns[: index + 1])
            border = len(os.path.commonprefix([alone, render([*turns[:index], other])]))
            end = begin + _common(whole[begin:], alone[border:])
        if end > begin:
            return begin, end
    raise RowError(
        f"messages[{index}]: its part of the chat template's text cannot be told; leave out train and weight"
    )


def _renamed(call: Any) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "name": BEGIN + END}}
    return {**call, "name": BEGIN + END}


def _common(text: str, expected: str) -> int:
    """Length of what `text` begins with of `expected`, without a token that is cut off and white space at the end."""
    common = os.path.commonprefix([text, expected])
    return len((common if common == expected else _PARTIAL_TAG.sub("", common)).rstrip())


def _moved(spans: Sequence[Span], begin: int, shift: int) -> list[Span]:
    """Ranges of the rendered conversation, in which the response begins at `begin`, as ranges of prompt + bridge +
    response. What the generation prompt gives of the last turn is no target."""
    return [(max(left, begin) + shift, right + shift) if right > begin else (left, right) for left, right in spans]


def template_ends(tokenizer: Any, settings: Mapping[str, Any]) -> list[int]:
    """The token that a chat template puts behind an assistant's turn; none without a template or such a token."""
    try:
        text = Conversations(tokenizer, settings)._end_of_turn(_Renderer(tokenizer, settings, {}))
    except RowError:
        return []
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = tokenizer(text or "", add_special_tokens=False)["input_ids"]
    return [index for index in ids if index in added or index in tokenizer.all_special_ids][:1]
