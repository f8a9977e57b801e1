"""What a `DistillationTrainer` is given, and how it was launched: right, or refused before anything is set up."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from distillm_ext.generation import Engine
from distillm_ext.generation.loop.forward import check_no_virtual_tokens
from distillm_ext.models.checks import check_apart, check_causal
from distillm_ext.training.config import DistillationConfig

# Optimizers of transformers' `optim` that take their steps inside the backward pass, beside the layerwise ones.
_IN_BACKWARD = ("lomo", "adalomo", "layerwisedummyoptimizer")


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
        RuntimeError: see `check_processes`.
    """
    if not isinstance(args, DistillationConfig):
        raise TypeError(
            f"args: expected a DistillationConfig, which takes every field of TrainingArguments; got {_name(args)}"
        )
    check_processes(args)
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


def _name(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def check_processes(args: DistillationConfig) -> None:
    """Refuses launches that would silently train one model per process, or replicate it within one.

    Raises:
        RuntimeError: the launcher's number of processes is not the one the arguments see.
        ValueError: several GPUs in one process.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise RuntimeError(
            f"the launcher started {launched} processes, but the training arguments see {args.world_size}: every "
            "process would train a model of its own. On CPU set use_cpu=True; on GPUs check that each process sees one"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: torch.nn.DataParallel is not supported; start one process per GPU with "
            "`torchrun --nproc_per_node N` or `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
        )


def check_nan_policy(args: DistillationConfig, optimizer: Any, *, deepspeed: bool) -> None:
    """Refuses to skip steps that nothing can keep from being taken.

    Args:
        args: the configuration.
        optimizer: one that was handed over, or None.
        deepspeed: whether DeepSpeed runs the training.

    Raises:
        ValueError: the policy cannot be kept with DeepSpeed, or with an optimizer that steps in the backward pass.
    """
    if args.nan_policy != "skip":
        return
    if deepspeed:
        raise ValueError(
            "nan_policy: 'skip' is not supported with DeepSpeed, whose engine takes the optimizer step inside the "
            "backward pass; set nan_policy='stop'"
        )
    optim = getattr(args.optim, "value", args.optim)
    if steps_in_backward(optim, optimizer):
        raise ValueError(
            f"nan_policy: 'skip' is not supported with optim={optim!r}, or an optimizer handed over, that takes its "
            "steps inside the backward pass; set nan_policy='stop', or an optimizer that is not layerwise"
        )


def steps_in_backward(name: Any, optimizer: Any) -> bool:
    """Whether an optimizer, by its name in transformers' `optim` or as it is, takes its steps inside the backward pass:
    LOMO and the layerwise ones."""
    if optimizer is not None:
        inner = getattr(optimizer, "optimizer", optimizer)
        return any(cls.__name__.lower() in _IN_BACKWARD for cls in type(inner).__mro__)
    text = str(name).lower()
    return text.endswith("layerwise") or text in _IN_BACKWARD
