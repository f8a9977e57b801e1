"""Which token ids there are: what a tokenizer gives, what each model knows, and what the losses compare."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset

logger = logging.getLogger(__name__)


def tokenizer_size(tokenizer: Any) -> int:
    """One more than the highest id that the tokenizer can give.

    `len(tokenizer)` counts tokens, which is less where ids in between have none (CodeLlama 34B and others).
    """
    ids = (*tokenizer.get_vocab().values(), *tokenizer.all_special_ids)
    return 1 + max((index for index in ids if index is not None), default=-1)


def embedding_size(model: Any) -> int:
    """Ids that a model's input embedding has a row for."""
    return _rows(model.get_input_embeddings())


def head_size(model: Any) -> int:
    """Entries of a model's logits."""
    return _rows(model.get_output_embeddings())


def _rows(module: Any) -> int:
    weight = module.weight
    # DeepSpeed ZeRO-3 leaves an empty tensor behind and notes its shape.
    shape = getattr(weight, "ds_shape", weight.shape)
    if len(shape) == 2 and weight.is_floating_point():
        return int(shape[0])
    # Quantised weights are stored in another shape. An adapter's layer may have out_features that is its width.
    return int(getattr(module, "num_embeddings", None) or module.out_features)


def compared_vocabulary(tokenizer: Any, *, student: Any = None, teacher: Any = None, cache: int | None = None) -> int:
    """Vocabulary entries that losses, metrics, captures and generation look at: the least of all sides'.

    Entries beyond are padding of the embedding (151936 against 152064 in one model family): no text holds them, and
    where one side lacks them a forward KL would be infinite.

    Args:
        tokenizer: its `tokenizer_size` counts.
        student, teacher: models, whose `head_size` counts; None is left out.
        cache: entries that a cache of the teacher's output was captured over, or None.
    """
    known = {
        name: head_size(model) for name, model in (("student", student), ("teacher", teacher)) if model is not None
    }
    known |= {"tokenizer": tokenizer_size(tokenizer)} | ({} if cache is None else {"cache": cache})
    size = min(known.values())
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in known.items())
        logger.warning("vocabulary sizes differ (%s): the first %d entries are compared", listed, size)
    return size


def padding_id(tokenizer: Any, *models: Any) -> int:
    """An id to fill batches with that every model has an embedding for.

    Padding is marked by the attention mask and meets no loss, so any id serves: the tokenizer's where all know it.
    """
    wanted = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    most = min((embedding_size(model) for model in models if model is not None), default=None)
    return wanted if wanted is not None and (most is None or wanted < most) else 0


def check_token_ids(
    rows: Iterable[tuple[np.ndarray, np.ndarray | None]],
    name: str,
    tokenizer: Any,
    *,
    models: Mapping[str, Any],
    vocab_size: int | None = None,
) -> None:
    """Refuses token rows that a model cannot read or the loss cannot compare.

    Args:
        rows: per row its token ids, and a mask of its targets or None.
        name: what to call the rows in messages.
        tokenizer: names the token.
        models: by name; None is left out. Every token must have an embedding in each.
        vocab_size: entries that are compared; every target must be among them. None is not looked at.

    Raises:
        ValueError: names the row, the token and the model.
    """
    limits = {who: embedding_size(model) for who, model in models.items() if model is not None}
    for number, (ids, mask) in enumerate(rows, start=1):
        found = _unknown(ids, mask, limits, vocab_size)
        if found is not None:
            token, reason = found
            text = tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
            raise ValueError(
                f"{name}, row {number}: token id {token} ({text!r}) {reason}. Use the tokenizer that the models were "
                "made with, or give the models rows for its added tokens (resize_token_embeddings) before distilling"
            )


def check_dataset_ids(
    dataset: Any, name: str, tokenizer: Any, *, models: Mapping[str, Any], vocab_size: int | None = None
) -> None:
    """`check_token_ids` of a data set with `input_ids` and `loss_mask`; anything else is not looked at."""
    if not isinstance(dataset, Dataset) or len(dataset) == 0:
        return
    sizes = [embedding_size(model) for model in models.values() if model is not None]
    least = min([*sizes, *([] if vocab_size is None else [vocab_size])], default=None)
    # All ids at once: the rows are only gone through where one of them is out of range.
    column = pyarrow.compute.list_flatten(dataset.data.column("input_ids"))
    bounds = pyarrow.compute.min_max(column).as_py()
    if least is None or bounds["max"] is None or (bounds["max"] < least and bounds["min"] >= 0):
        return
    batches = dataset.select_columns(["input_ids", "loss_mask"]).iter(batch_size=1000)
    rows = (
        (np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool))
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["loss_mask"], strict=True)
    )
    check_token_ids(rows, name, tokenizer, models=models, vocab_size=vocab_size)


def _unknown(
    ids: np.ndarray, mask: np.ndarray | None, limits: dict[str, int], vocab_size: int | None
) -> tuple[int, str] | None:
    """The first token of a row that a side lacks, and which."""
    highest = int(ids.max(initial=-1))
    lowest = int(ids.min(initial=0))
    if lowest < 0:
        return lowest, "is no id"
    for who, size in limits.items():
        if highest >= size:
            return int(ids[ids >= size][0]), f"is beyond the embedding of the {who}, which has {size} rows"
    if vocab_size is not None and highest >= vocab_size and mask is not None:
        targets = ids[np.asarray(mask, dtype=bool)]
        if len(targets) and int(targets.max()) >= vocab_size:
            token = int(targets[targets >= vocab_size][0])
            return token, f"is a target, and only the first {vocab_size} entries of the vocabularies are compared"
    return None
