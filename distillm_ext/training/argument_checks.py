"""The arguments of `DistillationTrainer`: of the right class, or refused by name before anything is set up."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from distillm_ext.generation import Engine
from distillm_ext.generation.loop.forward import check_no_virtual_tokens
from distillm_ext.models.checks import check_apart, check_causal
from distillm_ext.models.vocabulary import check_dataset_ids
from distillm_ext.training.config import DistillationConfig


def check_arguments(
    model: Any,
    teacher: Any,
    args: Any,
    processing_class: Any,
    generation_engine: Any,
    callbacks: Any,
    datasets: Mapping[str, Any],
) -> Any:
    """Refuses arguments of the wrong class; `teacher` is None where there is only a cache.

    Returns:
        The tokenizer of the run.

    Raises:
        TypeError, ValueError: names the argument of `DistillationTrainer` and the remedy.
    """
    if not isinstance(args, DistillationConfig):
        raise TypeError(
            f"args: expected a DistillationConfig, which takes every field of TrainingArguments; got {_name(args)}"
        )
    check_causal(model, "model")
    if teacher is not None:
        check_causal(teacher, "teacher")
        check_apart(model, teacher)
        _check_precision(model, teacher)
    for name, given in (("model", model), ("teacher", teacher)):
        check_no_virtual_tokens(given, name)
    for name, dataset in datasets.items():
        check_dataset(dataset, name, splits=name == "eval_dataset")
    if generation_engine is not None and not isinstance(generation_engine, Engine):
        raise TypeError(
            f"generation_engine: expected an Engine of distillm_ext.generation or None, got {_name(generation_engine)}"
        )
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"callbacks: expected a list of TrainerCallback, got {_name(callbacks)}; put it into a list")
    return text_tokenizer(processing_class)


def _check_precision(model: Any, teacher: Any) -> None:
    """float64 is kept as it is, so it must be on both sides."""
    dtypes = [next(part.parameters()).dtype for part in (model, teacher)]
    if torch.float64 in dtypes and dtypes[0] != dtypes[1]:
        names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        raise ValueError(
            f"teacher: a student of {names[0]} and a teacher of {names[1]} cannot be compared; float64 needs float64 "
            "on both sides. Load both in float64, or neither"
        )


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a run; of a processor, which handles images or sound beside text, its tokenizer is taken.

    Raises:
        TypeError: neither a tokenizer nor a processor that has one.
    """
    found = processing_class
    if not isinstance(found, PreTrainedTokenizerBase):
        found = getattr(processing_class, "tokenizer", None)
    if not isinstance(found, PreTrainedTokenizerBase):
        got = "the name " + repr(str(processing_class)) if isinstance(processing_class, (str, Path)) else None
        raise TypeError(
            "processing_class: expected the tokenizer that student and teacher share, got "
            f"{got or _name(processing_class)}; load it with AutoTokenizer.from_pretrained"
        )
    template = getattr(processing_class, "chat_template", None)
    if found is not processing_class and template is not None and found.chat_template is None:
        found = copy.deepcopy(found)  # the caller's tokenizer stays as it is
        found.chat_template = template
    return found


def check_dataset(dataset: Any, name: str, *, splits: bool = False) -> None:
    """A `datasets.Dataset` or None, or a dict of them where `splits` may be given.

    Raises:
        TypeError: names the argument and what to do.
    """
    if splits and isinstance(dataset, dict) and not isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        for split, part in dataset.items():
            check_dataset(part, f"{name}[{split}]")
        return
    if dataset is None or isinstance(dataset, Dataset):
        return
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        remedy = f"choose one of its splits ({', '.join(map(str, dataset))})"
    elif isinstance(dataset, IterableDataset):
        remedy = "streams are not supported: rows are counted, shuffled and met again; load it without streaming=True"
    elif isinstance(dataset, (list, tuple)):
        remedy = "make one with datasets.Dataset.from_list"
    elif isinstance(dataset, (str, Path)):
        remedy = "load it with distillm_ext.training.load_rows"
    else:
        remedy = "make one with datasets.Dataset.from_list or from_generator"
    raise TypeError(f"{name}: expected a datasets.Dataset, got {_name(dataset)}; {remedy}")


def check_tokens(splits: Mapping[str, Any], tokenizer: Any, models: Mapping[str, Any], vocab_size: int) -> None:
    """`check_dataset_ids` of prepared data sets by name; a dict of them is looked at part by part."""
    for name, split in splits.items():
        parts = {f"{name}[{key}]": part for key, part in split.items()} if isinstance(split, dict) else {name: split}
        for label, part in parts.items():
            check_dataset_ids(part, label, tokenizer, models=models, vocab_size=vocab_size)


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
