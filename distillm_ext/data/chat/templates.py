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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from distillm_ext.data.chat.generation_marks import MARK, marked_spans, with_marks
from distillm_ext.data.chat.turn_ranges import Messages, Span, check_shown, split_response, turn_range
from distillm_ext.data.rows.checks import TOOL_ROLES, RowError, turn_flag

__all__ = ["Conversations", "Exchange", "Messages", "Span", "split_response"]

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
        self._ends: dict[tuple[str, int], str | None] = {}

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
        begin, ends = len(whole) - len(response), self._end_of_turn(render)
        check_shown(render, turns, whole, response, ends)

        def ranges(flag: bool) -> list[Span]:
            places = [i for i in range(last) if messages[i]["role"] == "assistant" and flags[i] is flag]
            return [turn_range(render, turns, place, whole, ends, shown=flag) for place in places]

        # Marks become a mask through character offsets, which only tokenizers of the `tokenizers` library have.
        if render.has_marks and self.tokenizer.is_fast:
            spans: list[Span] | None = [*_marked(render, turns, ranges(False), whole), *ranges(True)]
            if flags[last]:
                spans = [*(spans or []), (begin, len(whole))]
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
        known = render.template, hash(json.dumps(render.options, default=repr, sort_keys=True))
        if known not in self._ends:
            probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
            try:
                text, found, end = render(probe).rpartition(_PROBE)
            except RowError:
                found = ""
            self._ends[known] = end.strip() if found else None
        return self._ends[known]


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
            raise RowError(f"the chat template rejects the conversation: {error}{_advice(messages)}") from error
        if any(_prints_parts(message, text) for message in messages):
            raise RowError("the chat template prints lists of parts as they stand in Python; give content as text")
        return text


def _advice(messages: Messages) -> str:
    """What may help where a chat template refuses messages, as the end of a sentence."""
    if any(isinstance(message.get("content"), list) for message in messages):
        return ". Contents that are lists of parts need a template that reads parts; else give them as text"
    calls = [call for message in messages for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
    functions = [call.get("function", call) for call in calls]
    if any(isinstance(f, Mapping) and isinstance(f.get("arguments"), str) for f in functions):
        return ". The tool-call arguments are JSON text; many templates want the mapping itself"
    if any(message.get("content") is None for message in messages):
        return '. Some templates want content to be "" and not null'
    return ""


def _prints_parts(message: Mapping[str, Any], text: str) -> bool:
    """Whether a list of parts stands in the text as Python prints it. A tool's result may be any list."""
    content = message.get("content")
    if not content or not isinstance(content, list) or message["role"] in TOOL_ROLES:
        return False
    return str(content) in text


def _flag(message: Mapping[str, Any], index: int, first_target: int) -> bool | None:
    if message["role"] != "assistant" or index < first_target:
        return False
    return turn_flag(message, f"messages[{index}]")


def _marked(render: _Renderer, turns: Messages, unwanted: Sequence[Span], whole: str) -> list[Span]:
    """Character ranges of `whole` inside generation marks, without those of turns that are no targets."""
    spans = marked_spans(render(turns, marked=True), whole)
    return [span for span in spans if not any(span[0] < right and left < span[1] for left, right in unwanted)]


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
