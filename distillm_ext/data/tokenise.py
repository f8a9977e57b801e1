"""From rows of text to token rows that carry the positions of the loss.

A token row is `input_ids`, `loss_mask` (1 at every token that is a target: assistant tokens with their EOS or
end-of-turn token) and `prompt_length` (tokens before the last response). The prompt is a token prefix of the whole row,
so a response generated from `input_ids[:prompt_length]` stands where the ground-truth response stood.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset

from distillm_ext.data.row_tokens import LEFT_OUT, RowTokenizer, TokenRow
from distillm_ext.data.rows.arrow_values import check_leaves, table_rows
from distillm_ext.data.rows.checks import TOKEN_COLUMNS, RowError, check_row
from distillm_ext.data.rows.files import warn_unused
from distillm_ext.data.rows.loading import load_rows
from distillm_ext.data.rows.origin import remembers_rows

__all__ = ["RowTokenizer", "load_rows", "prepare_dataset"]

logger = logging.getLogger(__name__)
_BATCH = 1000


@remembers_rows
def prepare_dataset(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_prompt_length: int,
    max_length: int,
    source: str = "dataset",
    prompts_only: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Tokenise a data set of `prompt`/`completion` or `messages` rows.

    Two strings are concatenated and the completion gets EOS. Conversations go through the tokenizer's chat template,
    with the row's `tools`, `documents` and `chat_template_kwargs` (columns of lists and mappings, or their JSON text).
    Of a dict of templates the one called "default" is used, "tool_use" where the row has tools.

    The prompt is what the template gives for generation; the response ends with what the template ends a turn with,
    else with EOS. The loss falls on every assistant turn that the template marks with `{% generation %}`, else on the
    last one. A turn with `train` false or `weight` 0 is no target; one with `train` true or `weight` 1 is, marked or
    not. What comes after the last target is left out.

    The template is given the values of the row as they are. In a data set that Arrow stored as structs, keys that are
    null are left out, since Arrow gives every row the keys of all; a message keeps a null `content`.

    A prompt longer than `max_prompt_length` loses tokens on the left; then the row is cut on the right to
    `max_length`. A row that has no response token, or no target, left is dropped. The log counts cut and dropped rows,
    and names columns that are not used.

    Args:
        dataset: rows; token rows (all of `input_ids`, `loss_mask` of 0 and 1, `prompt_length`) pass through unchanged.
        tokenizer: a Hugging Face tokenizer; it needs a chat template only for conversations.
        max_prompt_length: most tokens of the prompt.
        max_length: most tokens of prompt and response together.
        source: what to call the data set in messages, usually its file name.
        prompts_only: take rows of a prompt alone (`prompt`, or `messages` that end with another turn than the
            assistant's) too: `prompt_length` is then the length of `input_ids` and no token is a target.
        chat_template_kwargs: arguments for the chat template; a row's own win.

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
        return _token_rows(dataset, source, prompts_only)
    convert = RowTokenizer(
        tokenizer, max_prompt_length=max_prompt_length, max_length=max_length, prompts_only=prompts_only,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    tokens = _tokenised(dataset, convert, source)
    if len(tokens) == 0:
        raise ValueError(f"{source}: expected at least one row, got none")
    used = {name for names in tokens.unique("columns") for name in names.split(",")}
    warn_unused([name for name in dataset.column_names if name not in used], source)
    what = f"Dropping rows without response from {source}"
    kept = tokens.filter(lambda keep: keep, input_columns=["kept"], desc=what)
    if len(kept) == 0:
        raise ValueError(
            f"{source}: none of the {len(tokens)} rows keeps a response token within max_prompt_length="
            f"{max_prompt_length} and max_length={max_length}; raise max_length"
        )
    _log_counts(tokens, kept, source, max_prompt_length, max_length)
    return kept.select_columns(list(TOKEN_COLUMNS))


def _tokenised(dataset: Dataset, convert: RowTokenizer, source: str) -> Dataset:
    """Token rows with the columns that `_log_counts` counts."""
    # As Arrow tables: decoded rows would have their JSON columns rounded. A user's own transform is applied.
    own = dataset.format["type"] == "custom"
    tables = dataset if own else dataset.with_format("arrow", columns=dataset.format["columns"])
    found = tables.map(
        _Tokenise(convert, source), with_indices=True, batched=True, batch_size=_BATCH,
        remove_columns=dataset.column_names, desc=f"Tokenising {source}",
    )  # fmt: skip
    return found.with_format(None)


@dataclass(frozen=True)
class _Tokenise:
    """What is mapped over the data set. An object, whose fields are all that `datasets` hashes to find what it kept."""

    convert: RowTokenizer
    source: str

    def __call__(self, batch: Any, indices: Sequence[int]) -> dict[str, list[Any]]:
        if isinstance(batch, pyarrow.Table):
            rows = table_rows(batch)
        else:
            rows = [{name: batch[name][place] for name in batch} for place in range(len(indices))]
        return _columns([self._row(row, index + 1) for row, index in zip(rows, indices, strict=True)])

    def _row(self, row: Mapping[str, Any], number: int) -> TokenRow:
        try:
            check_leaves(row)
            return self.convert(row)
        except RowError as error:
            raise ValueError(f"{self.source}, row {number}: {error}") from error


def _columns(rows: Sequence[TokenRow]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows]
                                     for name in (*TOKEN_COLUMNS, "cut_prompt", "cut_response", "kept")}  # fmt: skip
    for place in range(len(LEFT_OUT)):
        columns[f"left_out_{place}"] = [row.left_out[place] for row in rows]
    # Text, since a column of the result is named in it and not stored.
    return {**columns, "columns": [",".join(row.columns) for row in rows]}


def _log_counts(tokens: Dataset, kept: Dataset, source: str, max_prompt_length: int, max_length: int) -> None:
    """One line each for what length limits and chat template took from the rows."""
    counted = ["cut_prompt", "cut_response", *(f"left_out_{place}" for place in range(len(LEFT_OUT)))]
    table = kept.select_columns(counted).with_format("arrow")[:]
    counts = {name: int(pyarrow.compute.sum(table[name]).as_py() or 0) for name in counted}
    cut = "%s: the limit max_%s=%d cuts %s of %d of %d rows; raise it to keep them"
    prompts, responses = counts["cut_prompt"], counts["cut_response"]
    if prompts:
        what = "the beginning of the prompt (system turn, BOS)"
        logger.warning(cut, source, "prompt_length", max_prompt_length, what, prompts, len(tokens))
    if responses:
        what = "the end of the response (and its end token)"
        logger.warning(cut, source, "length", max_length, what, responses, len(tokens))
    if len(kept) < len(tokens):
        logger.warning(
            "%s: dropped %d of %d rows, which have no response with a target within max_length=%d tokens; raise it to "
            "keep them", source, len(tokens) - len(kept), len(tokens), max_length,
        )  # fmt: skip
    for place, what in enumerate(LEFT_OUT):
        missing = counts[f"left_out_{place}"]
        if missing:
            logger.warning("%s: the chat template leaves out %s in %d of %d rows", source, what, missing, len(tokens))


def _token_rows(dataset: Dataset, source: str, prompts_only: bool) -> Dataset:
    """The token columns, each row checked; rows without a target are counted, and refused where there are no others."""
    warn_unused([name for name in dataset.column_names if name not in TOKEN_COLUMNS], source)
    rows = dataset.select_columns(list(TOKEN_COLUMNS))
    start = empty = alone = 0
    for batch in rows.with_format("arrow").iter(_BATCH):
        columns = [batch[name].to_pylist() for name in TOKEN_COLUMNS]
        for number, values in enumerate(zip(*columns, strict=True), start=start + 1):
            try:
                check_row(dict(zip(TOKEN_COLUMNS, values, strict=True)))
                _check_token_response(values, prompts_only)
            except RowError as error:
                raise ValueError(f"{source}, row {number}: {error}") from error
            ids, mask, prompt_length = values
            alone += prompt_length == len(ids)
            # Nothing precedes the first token, so it cannot be a target.
            empty += prompt_length < len(ids) and 1 not in mask[1:]
        start += len(batch)
    if empty:
        text = f"{source}: loss_mask has no target in {empty} of {start} rows"
        if empty == start - alone and not alone:
            raise ValueError(f"{text}, so there is nothing to learn; set it to 1 at the tokens of the responses")
        logger.warning("%s; they are not learnt from", text)
    return rows


def _check_token_response(values: Sequence[Any], prompts_only: bool) -> None:
    ids, _, prompt_length = values
    if prompt_length == len(ids) and not prompts_only:
        raise RowError(
            "prompt_length leaves no token of input_ids for a response; a prompt alone is enough only for policies "
            "that write the responses"
        )


def parts_of(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Data sets by name, without those that are None; of one that is a dict of data sets each part, as name[key]."""
    parts: dict[str, Any] = {}
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            parts |= {f"{name}[{key}]": part for key, part in dataset.items()}
        elif dataset is not None:
            parts[name] = dataset
    return parts
