"""Which tokens end a response: what tokenizer, models and training data say, in one place."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from distillm_ext.generation.loop.forward import causal_model

logger = logging.getLogger(__name__)

# Rows of a data set that are looked at, evenly spread over it: some thousands tell every kind of row that matters.
SCANNED_ROWS = 4096


def end_token_ids(
    tokenizer: Any,
    models: Mapping[str, Any],
    rows: Any = None,
    *,
    max_length: int | None = None,
    more: Iterable[int] = (),
    source: str = "train_dataset",
) -> tuple[int, ...]:
    """Every token that ends a response: the tokenizer's EOS, those of the models' configurations and generation
    configurations, and those that end the responses of the data.

    A chat model may end its turns with another token than its texts, and a base model that is trained on conversations
    learns an end that its configuration does not name. A warning names what the data alone say.

    Args:
        tokenizer: shared by the models.
        models: by the name that the log gives them; None is skipped.
        rows: a `datasets.Dataset` of token rows (`input_ids`, `loss_mask`, `prompt_length`), of which up to
            `SCANNED_ROWS` are looked at; anything else is not looked at.
        max_length: rows that long may have been cut, and tell nothing of their end.
        more: what else is known to end the responses of the data.
        source: what to call the rows in the log.

    Returns:
        Token ids, ascending.

    Example:
        >>> end_token_ids(tokenizer, {"student": student, "teacher": teacher}, rows, max_length=512)
        (151643, 151645)
    """
    declared = {token for model in models.values() if model is not None for token in declared_ends(model)}
    if tokenizer.eos_token_id is not None:
        declared.add(tokenizer.eos_token_id)
    found = data_ends(tokenizer, rows, max_length=max_length) if hasattr(rows, "select") else set()
    found |= set(more)
    for token in sorted(found - declared):
        logger.warning(
            "%s: responses end with %r (id %d), which neither the tokenizer nor a generation config names as an end; "
            "it ends generated responses too", source, tokenizer.convert_ids_to_tokens(token), token,
        )  # fmt: skip
    return tuple(sorted(declared | found))


def declared_ends(model: Any) -> set[int]:
    """End tokens of a model's generation configuration and of its configuration."""
    causal = causal_model(model)
    text = causal.config.get_text_config(decoder=True) if hasattr(causal.config, "get_text_config") else causal.config
    holders = (getattr(causal, "generation_config", None), causal.config, text)
    return {token for holder in holders for token in _listed(getattr(holder, "eos_token_id", None))}


def _listed(value: Any) -> Iterable[int]:
    if value is None:
        return ()
    return value if isinstance(value, (list, tuple)) else (value,)


def data_ends(tokenizer: Any, rows: Any, *, max_length: int | None) -> set[int]:
    """Tokens that end the responses of token rows.

    Such a token is one that the tokenizer adds to its vocabulary, and ends responses oftener than it stands within
    them (the end of a thought stands within). Where the tokenizer does not call it special, it must end half of the
    rows: an added word that a text happens to end with is no end.
    """
    last, inside = _closing_tokens(rows, max_length)
    special = set(tokenizer.all_special_ids) - {getattr(tokenizer, "unk_token_id", None)}
    added = {token: entry.special for token, entry in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    rows_told = last.total()
    return {
        token
        for token, count in last.items()
        if count > inside[token]
        and (token in special or added.get(token) or (token in added and 2 * count > rows_told))
    }


def _closing_tokens(rows: Any, max_length: int | None) -> tuple[Counter[int], Counter[int]]:
    """How often each token is the last target of a row, and how often such a token stands within a response."""
    from pyarrow import compute

    step = -(-len(rows) // SCANNED_ROWS) or 1
    columns = ["input_ids", "loss_mask", "prompt_length"]
    table = rows.select(range(0, len(rows), step)).select_columns(columns).with_format("arrow")[:]
    ids, masks = (table[name].combine_chunks() for name in columns[:2])
    lengths, prompts = compute.list_value_length(ids).to_numpy(), table["prompt_length"].to_numpy()
    tokens, targets = ids.flatten().to_numpy(), np.flatnonzero(masks.flatten().to_numpy(zero_copy_only=False))
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) - np.repeat(lengths.cumsum() - lengths, lengths)
    last = np.full(len(lengths), -1)
    last[row[targets]] = place[targets]  # the last of a row's targets is written last
    whole = (last >= prompts) & (lengths < (max_length or lengths.max(initial=0) + 1))
    ends = tokens[whole[row] & (place == last[row])]
    within = whole[row] & (place >= prompts[row]) & (place < last[row])
    return Counter(ends.tolist()), Counter(tokens[within & np.isin(tokens, ends)].tolist())


def name_ends(model: Any, ends: Iterable[int]) -> None:
    """Adds end tokens to a model's generation configuration, so that the saved model stops where it was taught to."""
    settings = getattr(causal_model(model), "generation_config", None)
    if settings is None:
        return
    named = list(_listed(settings.eos_token_id))
    named += [token for token in ends if token not in named]
    if len(named) > len(list(_listed(settings.eos_token_id))):
        settings.eos_token_id = named if len(named) > 1 else named[0]
