"""The data sets of a run: tokenised and numbered, or refused where a model cannot read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute
from datasets import Dataset

from distillm_ext.data.rows.loading import TOKEN_COLUMNS
from distillm_ext.data.rows.origin import keep_origin
from distillm_ext.data.tokenise import parts_of, prepare_dataset
from distillm_ext.generation.positions import check_positions
from distillm_ext.models.vocabulary import check_dataset_ids
from distillm_ext.training.config import DistillationConfig


def prepare_train(dataset: Dataset | None, tokenizer: Any, args: DistillationConfig) -> Dataset | None:
    """`prepare_split` for the training set, whose rows need responses only where a step of the policy reads them."""
    return prepare_split(dataset, tokenizer, args, "train_dataset", prompts_only=not args.needs_responses)


def prepare_split(
    dataset: Dataset | None, tokenizer: Any, args: DistillationConfig, source: str, *, prompts_only: bool = False
) -> Dataset | None:
    """Tokenises a data set and numbers its rows (column `row`), which names them in generation and storage.

    None stays None. With `prompts_only` rows of a prompt alone are taken too.
    """
    if dataset is None:
        return None
    with args.main_process_first(desc=f"tokenising {source}"):
        rows = prepare_dataset(
            dataset, tokenizer, max_prompt_length=args.max_prompt_length, max_length=args.max_length, source=source,
            prompts_only=prompts_only, chat_template_kwargs=args.template_kwargs,
        )  # fmt: skip
    if len(rows) == 0:
        raise ValueError(f"{source}: expected at least one row, got none")
    return keep_origin(rows.add_column("row", np.arange(len(rows), dtype=np.int64)), rows)


def prepare_eval(
    dataset: Dataset | dict[str, Dataset] | None, tokenizer: Any, args: DistillationConfig
) -> Dataset | dict[str, Dataset] | None:
    """`prepare_split` for the evaluation set, or for each of several.

    Raises:
        ValueError: the policy needs one evaluation set, and there is none or more than one.
    """
    if args.policy == "adaptive_off_policy" and (dataset is None or isinstance(dataset, dict)):
        found = "none" if dataset is None else f"a dict of {len(dataset)}"
        raise ValueError(
            f"eval_dataset: policy 'adaptive_off_policy' compares validation losses to set φ and needs one data set; "
            f"got {found}"
        )
    if isinstance(dataset, dict):
        return {name: prepare_split(split, tokenizer, args, f"eval_dataset[{name}]") for name, split in dataset.items()}
    return prepare_split(dataset, tokenizer, args, "eval_dataset")


def check_lengths(args: DistillationConfig, models: Mapping[str, Any], datasets: Mapping[str, Any]) -> None:
    """Refuses texts that a model of the run cannot read to their end (`check_positions`), and prompts of token rows
    that leave no room for a response where the policy generates one.

    Raises:
        ValueError: names model and limit, and the setting or the row.
    """
    check_positions(models, args.max_length, rows=parts_of(datasets))
    train = datasets["train_dataset"]
    if args.policy != "dataset" and set(TOKEN_COLUMNS) <= set(getattr(train, "column_names", None) or ()):
        lengths = train.select_columns(["prompt_length"]).with_format("numpy")[:]["prompt_length"]
        full = np.flatnonzero(lengths >= args.max_length)
        if len(full):
            raise ValueError(
                f"train_dataset: the prompt of row {full[0] + 1} has {lengths[full[0]]} tokens, which leave no room "
                f"for a response within max_length={args.max_length}; shorten it, or raise max_length"
            )


def check_tokens(splits: Mapping[str, Any], tokenizer: Any, models: Mapping[str, Any], vocab_size: int) -> None:
    """`check_dataset_ids` of prepared data sets by name; a dict of them is looked at part by part."""
    for name, part in parts_of(splits).items():
        check_dataset_ids(part, name, tokenizer, models=models, vocab_size=vocab_size)


def has_prompts_alone(rows: Any) -> bool:
    """Whether some of the token rows have no response."""
    if not isinstance(rows, Dataset):
        return False
    table = rows.select_columns(["input_ids", "prompt_length"]).with_format("arrow")[:]
    lengths = pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()
    return bool((lengths == table["prompt_length"].to_numpy()).any())
