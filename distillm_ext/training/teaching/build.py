"""Which teacher a run has: a model, a cache of its output, or both; and what a run can do with that cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from distillm_ext.data.tokenise import parts_of
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.vocabulary import tokenizer_size
from distillm_ext.paths import expand_path
from distillm_ext.teacher import CacheMismatch, TeacherCache
from distillm_ext.teacher.keys import sequence_key
from distillm_ext.teacher.settings import CompressionSettings
from distillm_ext.training.teaching.rules import check_cache_policy, check_compressed_loss

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


def compression_of_cache(
    cache: TeacherCache,
    *,
    vocab_size: int,
    reuse: str,
    temperatures: Sequence[float],
    divergence: str,
    alpha: float | None,
    tail: str | None,
    temperature: float,
) -> CompressionSettings:
    """How the cache's logits were compressed, which all teacher logits of a run that reads it then are.

    Args:
        cache: opened.
        vocab_size: entries that the losses compare.
        reuse: `reuse_teacher_logits` of the run.
        temperatures: at which its losses read the teacher.
        divergence, alpha, tail, temperature: of its main loss.

    Raises:
        ValueError: the run's losses cannot be had from the cache; names the setting.
    """
    settings = cache.spec.compression
    if reuse not in ("off", settings.method):
        raise ValueError(
            f"reuse_teacher_logits: the cache was captured with method {settings.method!r}, which all teacher logits "
            f"of the run then have; expected {settings.method!r} or 'off', got {reuse!r}"
        )
    check_compressed_loss(divergence, alpha=alpha, tail=tail, temperature=temperature, method=settings.method)
    for wanted in temperatures:
        if not has_temperature(settings, wanted):
            raise ValueError(
                f"temperature: {wanted:g} was not captured; the cache has "
                f"{', '.join(format(t, 'g') for t in settings.temperatures)}. Capture with --temperatures {wanted:g}"
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


def check_cache_alone(cache: TeacherCache, splits: Mapping[str, Any], *, policy: str, rank: int, world: int) -> None:
    """Refuses, before any step, what a run without a teacher model could not do.

    Args:
        cache: opened.
        splits: prepared rows by name, None where there are none.
        policy: the run's data policy.
        rank, world: of this process, which looks at its share of the rows.

    Raises:
        ValueError: a policy that needs fresh responses; an evaluation at a temperature that was not captured; a row
            that is not in the cache, by number.
    """
    check_cache_policy(policy)
    named = parts_of(splits)
    if any(name != "train_dataset" for name in named) and not has_temperature(cache.spec.compression, 1.0):
        raise ValueError(
            "eval_dataset: the divergence of the validation is taken at temperature 1, which the cache lacks; capture "
            "with --temperatures 1 beside the others, or pass no eval_dataset"
        )
    for name, split in named.items():
        _check_rows(cache, split, name, rank, world)


def _check_rows(cache: TeacherCache, dataset: Dataset, name: str, rank: int, world_size: int) -> None:
    share = dataset.select(range(rank, len(dataset), world_size)) if world_size > 1 else dataset
    for row in share:
        if not cache.has(sequence_key(row["input_ids"], row["loss_mask"])):
            raise ValueError(
                f"{name}: row {row['row']} ({len(row['input_ids'])} tokens, first {row['input_ids'][:8]}) is not in "
                f"the cache {cache.path}, which has {len(cache)} rows; capture this data set with the same tokenizer, "
                "max_prompt_length and max_length, or give the teacher model beside the cache"
            )
