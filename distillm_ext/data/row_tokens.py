"""One row of text as one row of tokens with the positions of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from distillm_ext.data.chat.templates import Conversations, Exchange, Messages, Span
from distillm_ext.data.rows.checks import (
    RowError,
    called_names,
    check_response,
    check_row,
    checked_template_kwargs,
    message_texts,
    parsed_row,
    used_columns,
)

# Counts what is made of a row: results that `datasets` kept of an earlier count are not taken for this one's.
_RULES = 3
LEFT_OUT = ("text of a message", "the name of a called tool", "the reasoning of the last turn")


@dataclass(frozen=True)
class TokenRow:
    """Tokens of a row before and after cutting.

    Attributes:
        input_ids, loss_mask: prompt and response; 1 where a token is a target.
        prompt_length: tokens of the prompt; all of them for a prompt alone.
        columns: the columns that the row was made of.
        left_out: which of `LEFT_OUT` the chat template does not show.
        cut_prompt, cut_response: whether tokens were cut off on the left, on the right.
        kept: whether a target, or a prompt alone, is left.
    """

    input_ids: list[int]
    loss_mask: list[int]
    prompt_length: int
    columns: tuple[str, ...] = ()
    left_out: tuple[bool, ...] = (False,) * len(LEFT_OUT)
    cut_prompt: bool = False
    cut_response: bool = False
    kept: bool = True


class RowTokenizer:
    """Turns one row of text into one token row, already cut; `prepare_dataset` explains the rules.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_prompt_length, max_length, prompts_only, chat_template_kwargs: as in `prepare_dataset`.

    Raises (from a call):
        RowError: what is wrong with the row.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_prompt_length: int,
        max_length: int,
        prompts_only: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_length = max_length
        self.prompts_only = prompts_only
        self.conversations = Conversations(tokenizer, checked_template_kwargs(chat_template_kwargs))
        self.made_by = (_RULES, transformers.__version__)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.added = {index: token.content for index, token in added.items()}
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        bos = tokenizer.bos_token_id
        with_bos = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
        self.prefix = [bos] if with_bos else []

    def __call__(self, row: Mapping[str, Any]) -> TokenRow:
        row = parsed_row(row)
        kind = check_row(row)
        if kind in ("tokens", "text"):
            raise RowError(f"a row of kind {kind!r} has no prompt and response; give 'prompt' and 'completion'")
        if not self.prompts_only:
            check_response(row, kind)
        columns = used_columns(row, kind)
        if kind == "completion" and isinstance(row["prompt"], str):
            made = self._plain(row["prompt"], row["completion"])
        elif kind == "completion":
            made = self._chat([*row["prompt"], *row["completion"]], len(row["prompt"]), row)
        elif "messages" in columns:
            made = self._chat(row["messages"], 0, row)
        else:
            made = self._prompt(row["prompt"], row)
        if made.prompt_length == 0:
            raise RowError("the prompt has no token, so there is nothing to respond to; give it text")
        return self._cut(made, columns)

    def _cut(self, made: TokenRow, columns: tuple[str, ...]) -> TokenRow:
        cut = max(0, made.prompt_length - self.max_prompt_length)
        ids, mask = made.input_ids[cut:][: self.max_length], made.loss_mask[cut:][: self.max_length]
        # Nothing precedes the first token, so no model output can be its prediction.
        mask[0] = 0
        length = min(made.prompt_length - cut, len(ids))
        left = length < len(ids) and any(mask)
        alone = made.prompt_length == len(made.input_ids)
        return TokenRow(
            ids, mask, length, columns, made.left_out, cut_prompt=cut > 0 or (alone and length < made.prompt_length),
            cut_response=not alone and len(made.input_ids) - cut > len(ids), kept=alone or left,
        )  # fmt: skip

    # ---- text

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_pieces(self, *pieces: str) -> list[list[int]]:
        """Tokens of pieces of a text such that the first stands alone as it does when generating.

        The joint tokenisation is used where what is before a piece is a prefix of it (it avoids the leading space that
        SentencePiece tokenizers put before every separate text); where a merge spans the border, separate ones.
        """
        text = ""
        ids: list[int] = []
        found: list[list[int]] = []
        for piece in pieces:
            joint = self._encode(text + piece)
            new = joint[len(ids) :] if joint[: len(ids)] == ids else self._encode(piece)
            text, ids = text + piece, ids + new
            found.append(new)
        return found

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise RowError("the tokenizer has no EOS token, so a response has no end; set tokenizer.eos_token")
        return self.tokenizer.eos_token_id

    def _plain(self, prompt: str, completion: str) -> TokenRow:
        eos = self._eos()
        prompt_ids, response = self._encode_pieces(prompt, completion)
        prompt_ids = self._begun(prompt_ids)
        if eos in response:
            end = len(response) - response[::-1].index(eos)
            # White space behind an end of the data's own is not generated.
            response = response if self.tokenizer.decode(response[end:]).strip() else response[:end]
        if response[-1:] != [eos]:
            response = [*response, eos]
        return TokenRow(prompt_ids + response, [0] * len(prompt_ids) + [1] * len(response), len(prompt_ids))

    def _begun(self, ids: list[int]) -> list[int]:
        """With BOS before, once, where the tokenizer puts it there."""
        return ids if self.prefix == ids[:1] else self.prefix + ids

    def _prompt(self, prompt: Any, row: Mapping[str, Any]) -> TokenRow:
        if isinstance(prompt, str):
            ids, left_out = self._begun(self._encode(prompt)), TokenRow.left_out
        else:
            text = self.conversations.prompt(prompt, row)
            ids, left_out = self._encode(text), _left_out(prompt, text, None)
        return TokenRow(ids, [0] * len(ids), len(ids), left_out=left_out)

    # ---- conversations

    def _chat(self, messages: Messages, first_target: int, row: Mapping[str, Any]) -> TokenRow:
        """Tokens of a conversation up to its last target; targets begin at message `first_target`."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or (self.prompts_only and answers[-1] < len(messages) - 1):
            return self._prompt(messages, row)
        exchange = self.conversations.exchange(messages, first_target, row)
        if exchange is None and self.prompts_only:
            return self._prompt(messages[: answers[-1]], row)
        if exchange is None:
            raise RowError("weight 0 or train false at every assistant turn leaves nothing to learn; remove the row")
        return self._exchange(exchange)

    def _exchange(self, exchange: Exchange) -> TokenRow:
        prompt, bridge, response = self._encode_pieces(exchange.prompt, exchange.bridge, exchange.response)
        if exchange.targets is None:
            mask = [0] * len(prompt + bridge) + [1] * len(response)
        else:
            mask = self._mask((exchange.prompt, exchange.bridge, exchange.response), exchange.targets)
        response = self._ended(response, exchange.ends)
        ids = prompt + bridge + response
        # An end that the template does not write is a target where the response is one.
        mask = mask[: len(ids)] + [int(any(mask[len(prompt) :]))] * (len(ids) - len(mask))
        if not any(mask):
            raise RowError("the chat template's {% generation %} marks cover no token of this conversation")
        text = exchange.prompt + exchange.bridge + exchange.response
        return TokenRow(ids, mask, len(prompt), left_out=_left_out(exchange.turns, text, exchange.response))

    def _ended(self, response: list[int], ends: str | None) -> list[int]:
        """The response up to its end token: without the white space that templates put behind it, since generation
        stops before; with EOS where the template writes no end."""
        known = {index for index, text in self.added.items() if ends and text in ends} | self.special_ids
        end = len(response)
        while end and response[end - 1] not in known:
            end -= 1
        has_end = end > 0 and not self.tokenizer.decode(response[end:]).strip()
        if has_end and (ends != "" or response[end - 1] == self.tokenizer.eos_token_id):
            return response[:end]
        return [*response, self._eos()]

    def _mask(self, pieces: Sequence[str], targets: Sequence[Span]) -> list[int]:
        """1 at the tokens of `_encode_pieces(*pieces)` that have a character of a target."""
        text = ""
        ids: list[int] = []
        pairs: list[Span] = []
        for piece in pieces:
            joint, found = self._offsets(text + piece)
            if joint[: len(ids)] == ids:
                ids, pairs = joint, found
            else:
                alone, found = self._offsets(piece)
                pairs += [(left + len(text), right + len(text)) for left, right in found]
                ids = ids + alone
            text += piece
        return [int(any(left < stop and start < right for start, stop in targets)) for left, right in pairs]

    def _offsets(self, text: str) -> tuple[list[int], list[Span]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]


def _left_out(turns: Messages, text: str, response: str | None) -> tuple[bool, ...]:
    """Which of `LEFT_OUT` is not in the text, or in the response that is the last turn (None: there is none)."""
    last = turns[-1] if response is not None else {}
    spoken = [piece.strip() for turn in turns if turn["role"] in ("user", "assistant", "system")
              for piece in message_texts(turn)]  # fmt: skip
    names = [name for turn in turns for name in called_names(turn)]
    thoughts = [last.get(key) for key in ("reasoning_content", "reasoning", "thinking")]
    if isinstance(last.get("content"), str) and "</think>" in last["content"]:
        thoughts.append(last["content"].rpartition("</think>")[0].removeprefix("<think>"))
    reasons = [thought.strip() for thought in thoughts if isinstance(thought, str)]
    return tuple(any(piece not in shown for piece in pieces)
                 for pieces, shown in ((spoken, text), (names, text), (reasons, response or "")))  # fmt: skip
