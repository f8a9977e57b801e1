"""Which teacher a run has: a model, a cache of its output, or both; and what follows from that."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.vocabulary import tokenizer_size
from distillm_ext.paths import expand_path
from distillm_ext.teacher import CacheMismatch, TeacherCache
from distillm_ext.teacher.keys import sequence_key
from distillm_ext.teacher.settings import CompressionSettings
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.teaching.rules import check_cache_policy, check_compressed_loss, tail_of
from distillm_ext.training.teaching.sources import KeptTargets, LiveTargets
from distillm_ext.training.teaching.stores import ReuseStores

CacheLike = str | Path | TeacherCache


def split_teacher(teacher: Any, teacher_cache: CacheLike | None) -> tuple[Any, CacheLike | None]:
    """(model or None, cache or None) of the trainer's two arguments.

    Raises:
        TypeError: neither is given, or something else than a model and a cache.
        ValueError: two caches.
    """
    if teacher_cache is not None and not isinstance(teacher_cache, (str, Path, TeacherCache)):
        raise TypeError(
            f"teacher_cache: expected the folder of a cache or a TeacherCache, got {type(teacher_cache).__name__}; a "
            "model is passed as teacher"
        )
    if isinstance(teacher, str) and not Path(expand_path(teacher, "teacher")).is_dir():
        raise TypeError(
            f"teacher: expected a causal language model or the folder of a cache, and {str(teacher)!r} is no folder; "
            "load a model with AutoModelForCausalLM.from_pretrained, make a cache with distillm capture"
        )
    if isinstance(teacher, (str, Path, TeacherCache)):
        if teacher_cache is not None:
            raise ValueError(
                "teacher_cache: teacher is a cache already; expected a model there, or only one of the two"
            )
        return None, teacher
    if teacher is None and teacher_cache is None:
        raise TypeError("teacher: expected a causal language model, or a cache of its output; got None")
    return teacher, teacher_cache


def open_cache(cache: CacheLike | None, *, model: ModelTeacher | None, tokenizer: Any) -> TeacherCache | None:
    """Opens the cache and checks that it was made for this tokenizer and, where there is a model, for it.

    Raises:
        CacheError: no cache there, a damaged one, or one for something else; the message says which.
    """
    if cache is None:
        return None
    path = cache.path if isinstance(cache, TeacherCache) else cache
    opened = TeacherCache.open(path, teacher=model.model if model is not None else None, tokenizer=tokenizer)
    size, captured = tokenizer_size(tokenizer), opened.spec.compression.vocab_size
    # Caches from before `tokenizer_size` was noted had counted tokens in place of ids.
    if "tokenizer_size" not in opened.spec.details and captured == len(tokenizer) < size:
        raise CacheMismatch(
            f"the cache {opened.path} looks at the first {captured} entries of the vocabulary, as many "
            f"as the tokenizer has tokens; its ids go up to {size - 1}, so the last tokens are missing. Capture again"
        )
    return opened


def needed_temperatures(args: DistillationConfig) -> tuple[float, ...]:
    """Temperatures at which a loss of the run reads the teacher, ascending."""
    warmup = {1.0} if args.warmup_objective == "forward_kl" and args.warmup_objective_steps else set()
    return tuple(sorted({float(args.temperature), *warmup}))


def compression(args: DistillationConfig, cache: TeacherCache | None, vocab_size: int) -> CompressionSettings | None:
    """The compression of the run's teacher, None where its logits are used as they are.

    Raises:
        ValueError: what the configuration asks for cannot be had from the cache.
    """
    if cache is None:
        if args.reuse_teacher_logits == "off":
            if args.tail is not None:
                raise ValueError(
                    f"tail: says how compressed teacher logits are read, and the teacher's are not compressed; set "
                    f"reuse_teacher_logits or leave it out, got {args.tail!r}"
                )
            return None
        return CompressionSettings(
            vocab_size, args.reuse_k, args.reuse_teacher_logits, args.reuse_codec, needed_temperatures(args),
            labels=False, seed=args.seed,
        )  # fmt: skip
    settings = cache.spec.compression
    if args.reuse_teacher_logits not in ("off", settings.method):
        raise ValueError(
            f"reuse_teacher_logits: the cache was captured with method {settings.method!r}, which all teacher logits "
            f"of the run then have; expected {settings.method!r} or 'off', got {args.reuse_teacher_logits!r}"
        )
    check_compressed_loss(
        args.divergence, alpha=args.alpha, tail=args.tail, temperature=args.temperature, method=settings.method
    )
    for temperature in needed_temperatures(args):
        if not has_temperature(settings, temperature):
            raise ValueError(
                f"temperature: {temperature:g} was not captured; the cache has "
                f"{', '.join(format(t, 'g') for t in settings.temperatures)}. Capture with "
                f"--temperatures {temperature:g}"
            )
    if settings.method == "sample" and vocab_size < settings.vocab_size:
        raise ValueError(
            f"teacher: the cache holds draws over {settings.vocab_size} entries and the loss compares {vocab_size}; "
            "cutting draws biases what they estimate. Use a student with the whole vocabulary, or method 'topk'"
        )
    return settings


def has_temperature(settings: CompressionSettings, temperature: float) -> bool:
    """Whether normaliser and tail mass at this temperature were kept."""
    return any(math.isclose(kept, temperature, rel_tol=1e-6) for kept in settings.temperatures)


def compressed_tail(args: DistillationConfig, settings: CompressionSettings | None) -> str:
    """`tail` of the run's losses; without compression it is not looked at."""
    return "bucket" if settings is None else tail_of(args.tail, settings.method)


def make_teaching(
    args: DistillationConfig,
    settings: CompressionSettings | None,
    *,
    model: ModelTeacher | None,
    cache: TeacherCache | None,
    collator: DistillationCollator,
    train_dataset: Any,
) -> LiveTargets:
    """What the losses read of the teacher."""
    if settings is None:
        assert model is not None  # without a cache there is a model
        return LiveTargets(model)
    stores = ReuseStores(
        settings.record_bytes,
        folder=Path(str(args.output_dir)),
        rank=args.process_index,
        world_size=args.world_size,
        num_rows=len(train_dataset) if train_dataset is not None else 0,
        gather=gather_object,
    )
    return KeptTargets(
        settings,
        model=model,
        cache=cache,
        stores=stores,
        collator=collator,
        batch_size=args.per_device_train_batch_size,
        device=args.device,
    )


def check_cache_alone(
    args: DistillationConfig,
    cache: TeacherCache,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> None:
    """Refuses, before any step, what a run without a teacher model could not do.

    Raises:
        ValueError: a policy that needs fresh responses; an evaluation at a temperature that was not captured; a row
            that is not in the cache, by number.
    """
    check_cache_policy(args.policy)
    splits = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    if any(split is not None for split in splits.values()):
        if not has_temperature(cache.spec.compression, 1.0):
            raise ValueError(
                "eval_dataset: the divergence of the validation is taken at temperature 1, which the cache lacks; "
                "capture with --temperatures 1 beside the others, or pass no eval_dataset"
            )
    named = {"train_dataset": train_dataset}
    named |= {f"eval_dataset[{name}]" if name else "eval_dataset": split for name, split in splits.items()}
    for name, split in named.items():
        if split is not None:
            _check_rows(cache, split, name, args.process_index, args.world_size)


def _check_rows(cache: TeacherCache, dataset: Dataset, name: str, rank: int, world_size: int) -> None:
    share = dataset.select(range(rank, len(dataset), world_size)) if world_size > 1 else dataset
    for row in share:
        if not cache.has(sequence_key(row["input_ids"], row["loss_mask"])):
            raise ValueError(
                f"{name}: row {row['row']} ({len(row['input_ids'])} tokens, first {row['input_ids'][:8]}) is not in "
                f"the cache {cache.path}, which has {len(cache)} rows; capture this data set with the same tokenizer, "
                "max_prompt_length and max_length, or give the teacher model beside the cache"
            )
