"""From rows of text to token rows that carry the positions of the loss.

A token row is `input_ids`, `loss_mask` (1 at every token that is a target: assistant tokens with their EOS or
end-of-turn token) and `prompt_length` (tokens before the last response). The prompt is a token prefix of the whole row,
so a response generated from `input_ids[:prompt_length]` stands where the ground-truth response stood.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from distillm_ext.training.rows import TOKEN_COLUMNS, RowError, check_row, load_rows

__all__ = ["RowTokenizer", "load_rows", "prepare_dataset"]

logger = logging.getLogger(__name__)
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def prepare_dataset(
    dataset: Dataset, tokenizer: Any, *, max_prompt_length: int, max_length: int, source: str = "dataset"
) -> Dataset:
    """Tokenise a data set of `prompt`/`completion` or `messages` rows.

    Two strings are concatenated and the completion gets EOS. Conversations go through the tokenizer's chat template.
    The loss falls on every assistant turn that the template marks with `{% generation %}`, else on the last one.
    A prompt longer than `max_prompt_length` loses tokens on the left; then the row is cut on the right to
    `max_length`. A row that has no response token left is dropped; the number of dropped rows is logged.

    Args:
        dataset: rows; token rows (all of `input_ids`, `loss_mask`, `prompt_length`) pass through unchanged.
        tokenizer: a Hugging Face tokenizer.
        max_prompt_length: most tokens of the prompt.
        max_length: most tokens of prompt and response together.
        source: what to call the data set in messages, usually its file name.

    Returns:
        A data set with the columns `input_ids` list[int], `loss_mask` list[int], `prompt_length` int.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`.
        ValueError: a bad row (`source`, the row's 1-based number and the remedy), bad lengths, or no row left.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["2+2="], "completion": ["4"]})
        >>> prepare_dataset(rows, tokenizer, max_prompt_length=64, max_length=128)  # doctest: +SKIP
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{source}: expected a datasets.Dataset, got {type(dataset).__name__}; load it with load_rows")
    for name, value in (("max_prompt_length", max_prompt_length), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if set(TOKEN_COLUMNS) <= set(dataset.column_names):
        return dataset.select_columns(list(TOKEN_COLUMNS))
    convert = RowTokenizer(tokenizer, max_prompt_length=max_prompt_length, max_length=max_length)

    def tokenise(row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            return convert(row)
        except RowError as error:
            raise ValueError(f"{source}, row {index + 1}: {error}") from error

    tokens = dataset.map(tokenise, with_indices=True, remove_columns=dataset.column_names, desc=f"Tokenising {source}")
    kept = tokens.filter(
        lambda ids, prompt_length: prompt_length < len(ids),
        input_columns=["input_ids", "prompt_length"],
        desc=f"Dropping rows without response from {source}",
    )
    dropped = len(tokens) - len(kept)
    if len(kept) == 0:
        raise ValueError(
            f"{source}: none of the {len(tokens)} rows keeps a response token within max_prompt_length="
            f"{max_prompt_length} and max_length={max_length}; raise max_length"
        )
    if dropped:
        logger.warning(
            "%s: dropped %d of %d rows, whose response does not begin within max_length=%d tokens",
            source,
            dropped,
            len(tokens),
            max_length,
        )
    return kept


class RowTokenizer:
    """Turns one row of text into one token row, already truncated; `prepare_dataset` explains the rules.

    A row whose whole response was cut off comes back with `prompt_length == len(input_ids)`.
    """

    def __init__(self, tokenizer: Any, *, max_prompt_length: int, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.max_length = max_length
        self.has_template = getattr(tokenizer, "chat_template", None) is not None
        template = tokenizer.get_chat_template() if self.has_template else ""
        # Marks become a mask through character offsets, which only tokenizers of the `tokenizers` library have.
        self.has_marks = bool(_GENERATION_MARK.search(template)) and tokenizer.is_fast
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special_ids = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        bos = tokenizer.bos_token_id
        with_bos = bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]
        self.prefix = [bos] if with_bos else []

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        kind = check_row(row)
        if kind == "completion" and isinstance(row["prompt"], str):
            ids, mask, prompt_length = self._plain(row["prompt"], row["completion"])
        elif kind == "completion":
            ids, mask, prompt_length = self._chat(row["prompt"] + row["completion"], len(row["prompt"]))
        elif kind == "messages":
            ids, mask, prompt_length = self._chat(row["messages"], 0)
        else:
            raise RowError(f"a row of kind {kind!r} has no prompt and response; give 'prompt' and 'completion'")
        if prompt_length == 0:
            raise RowError("the prompt has no token, so there is nothing to respond to; give it text")
        cut = max(0, prompt_length - self.max_prompt_length)
        ids, mask = ids[cut:][: self.max_length], mask[cut:][: self.max_length]
        # Nothing precedes the first token, so no model output can be its prediction.
        mask[0] = 0
        return {"input_ids": ids, "loss_mask": mask, "prompt_length": min(prompt_length - cut, len(ids))}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_pair(self, prompt: str, rest: str) -> tuple[list[int], list[int]]:
        """Tokens of prompt and rest such that the prompt stands alone as it does when generating.

        The joint tokenisation is used where the prompt is a prefix of it (it avoids the leading space that
        SentencePiece tokenizers put before every separate text); where a merge spans the border, two separate ones.
        """
        prompt_ids = self._encode(prompt)
        joint = self._encode(prompt + rest)
        if joint[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, joint[len(prompt_ids) :]
        return prompt_ids, self._encode(rest)

    def _plain(self, prompt: str, completion: str) -> tuple[list[int], list[int], int]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise RowError("the tokenizer has no EOS token, so a completion has no end; set tokenizer.eos_token")
        prompt_ids, response = self._encode_pair(prompt, completion)
        prompt_ids = self.prefix + prompt_ids
        if response[-1:] != [eos]:
            response = [*response, eos]
        return prompt_ids + response, [0] * len(prompt_ids) + [1] * len(response), len(prompt_ids)

    def _chat(self, messages: list[dict[str, Any]], first_target: int) -> tuple[list[int], list[int], int]:
        """Tokens of a conversation up to its last assistant turn; targets begin at message `first_target`."""
        if not self.has_template:
            raise RowError(
                "the row is a conversation and the tokenizer has no chat template; set tokenizer.chat_template, "
                "or give prompt and completion as strings"
            )
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        if last == 0:
            raise RowError("the only assistant turn is the first message, so there is no prompt; add a user turn")
        prompt = self._render(messages[:last], add_generation_prompt=True)
        whole = self._render(messages[: last + 1])
        if not whole.startswith(prompt):
            raise RowError(
                "the chat template does not begin the conversation with the text it gives as generation prompt; use a "
                "template that does, or give prompt and completion as strings"
            )
        prompt_ids, response = self._encode_pair(prompt, whole[len(prompt) :])
        response = self._strip_after_end_of_turn(response)
        ids = prompt_ids + response
        if not self.has_marks:
            return ids, [0] * len(prompt_ids) + [1] * len(response), len(prompt_ids)
        mask = self._marked(messages[: last + 1], prompt, whole, first_target)[: len(ids)]
        if not any(mask):
            raise RowError("the chat template's {% generation %} marks cover no token of this conversation")
        return ids, mask, len(prompt_ids)

    def _render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise RowError(f"the chat template rejects the conversation: {error}") from error

    def _strip_after_end_of_turn(self, ids: list[int]) -> list[int]:
        """Drop the white space that templates put behind the end-of-turn token: generation stops before it."""
        end = len(ids)
        while end and ids[end - 1] not in self.special_ids:
            end -= 1
        return ids[:end] if end and not self.tokenizer.decode(ids[end:]).strip() else ids

    def _marked(self, messages: list[dict[str, Any]], prompt: str, whole: str, first_target: int) -> list[int]:
        """Mask of the tokens inside `{% generation %}` marks, from message `first_target` on."""
        marked = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        offsets = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        begin = len(self._render(messages[:first_target])) if first_target else 0
        wanted = bytearray(len(whole))
        for (left, right), flag in zip(offsets, marked, strict=True):
            if left < len(prompt) < right:
                left = len(prompt)  # a token merged over the border: the prompt's part of it is no response
            if flag and left >= begin:
                wanted[left:right] = b"\x01" * (right - left)
        # The row may be tokenised in two pieces: carry the mask over by characters.
        pieces = self._piece_offsets(prompt, whole)
        return [int(any(wanted[left:right])) for left, right in pieces]

    def _piece_offsets(self, prompt: str, whole: str) -> list[tuple[int, int]]:
        """Character offsets, in `whole`, of the tokens that `_encode_pair` gives."""

        def offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(out["input_ids"]), [tuple(pair) for pair in out["offset_mapping"]]

        prompt_ids, prompt_pairs = offsets(prompt)
        joint, joint_pairs = offsets(whole)
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint_pairs
        rest_pairs = offsets(whole[len(prompt) :])[1]
        return prompt_pairs + [(left + len(prompt), right + len(prompt)) for left, right in rest_pairs]
