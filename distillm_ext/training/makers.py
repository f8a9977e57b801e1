"""The parts of a run as its configuration wants them: policy, rollouts, teacher source, objectives, plain text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.chat.templates import template_ends
from distillm_ext.data.plain_text import PlainTextBatches, pack_text
from distillm_ext.data.rows.loading import load_rows
from distillm_ext.generation import Engine, LocalEngine, full_weights
from distillm_ext.generation.ends import end_token_ids, name_ends
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.vocabulary import check_token_ids
from distillm_ext.teacher import CompressionSettings, TeacherCache
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.objectives import CrossEntropyObjective, DivergenceObjective, Objective, ObjectiveSchedule
from distillm_ext.training.rollouts.policies import Policy, make_policy
from distillm_ext.training.rollouts.replay import ReplayBuffer
from distillm_ext.training.rollouts.rollouts import EngineResponses, Rollouts
from distillm_ext.training.rollouts.schedule import SCHEDULES
from distillm_ext.training.splits import has_prompts_alone
from distillm_ext.training.teaching.build import compression_of_cache
from distillm_ext.training.teaching.rules import tail_of
from distillm_ext.training.teaching.sources import KeptTargets, LiveTargets, TeacherSource
from distillm_ext.training.teaching.stores import ReuseStores


def make_run_policy(args: DistillationConfig) -> Policy:
    """The data policy with its schedule."""
    schedule = SCHEDULES[args.schedule](args.sgo_initial, args.sgo_increment, args.sgo_threshold, args.replay_ratio)
    return make_policy(args.policy, mixed_fraction=args.mixed_fraction, schedule=schedule)


def make_objectives(args: DistillationConfig, vocab_size: int, tail: str) -> ObjectiveSchedule:
    """The main objective and, if configured, the one of the warm-up; `tail` is that of compressed teacher logits."""
    main = DivergenceObjective(
        args.divergence, args.alpha, args.beta, args.temperature, ce_weight=args.ce_weight, vocab_size=vocab_size,
        tail=tail,
    )  # fmt: skip
    warmup: Objective | None = None
    if args.warmup_objective == "sft":
        warmup = CrossEntropyObjective()
    elif args.warmup_objective == "forward_kl":
        warmup = DivergenceObjective("forward_kl", vocab_size=vocab_size, tail=tail)
    return ObjectiveSchedule(main, warmup, args.warmup_objective_steps)


def response_ends(
    args: DistillationConfig, tokenizer: Any, models: Mapping[str, Any], train_dataset: Any
) -> tuple[int, ...]:
    """Tokens that end the responses of student and teacher (`end_token_ids`). The student's generation config names
    them from now on, so the saved model stops where it was taught to."""
    more = template_ends(tokenizer, args.template_kwargs) if has_prompts_alone(train_dataset) else ()
    ends = end_token_ids(tokenizer, models, train_dataset, max_length=args.max_length, more=more)
    name_ends(models["student"], ends)
    return ends


# ---- responses


def replay_capacity(args: DistillationConfig) -> int:
    """Sequences in the replay buffer of one process.

    Raises:
        ValueError: the adaptive policy could never replay, for one process's share is smaller than its batch.
    """
    share = args.replay_capacity // args.world_size
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.policy == "adaptive_off_policy" and share < batch:
        raise ValueError(
            f"replay_capacity: {args.replay_capacity} over {args.world_size} processes leaves {share} sequences for "
            f"each, fewer than the {batch} of an optimizer step; set it to at least {batch * args.world_size}"
        )
    return max(share, 1)


def make_rollouts(
    args: DistillationConfig,
    *,
    collator: DistillationCollator,
    student: Callable[[], Any],
    teacher: Any,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    autocast: Callable[[], Any],
    train_dataset: Dataset | None,
    engine: Engine | None,
) -> Rollouts:
    """Buffer, response sources and batches; `engine` generates for the student, None is the decode loop on it."""

    def answers(model: Callable[[], Any], engine: Engine) -> EngineResponses:
        return EngineResponses(
            engine,
            args.sampling_params,
            max_new_tokens=args.max_new_tokens,
            max_length=args.max_length,
            eos_token_ids=eos_token_ids,
            vocab_size=vocab_size,
            weights=lambda: full_weights(model()),
        )

    def prompts_of_this_process() -> list[tuple[list[int], int]]:
        assert train_dataset is not None  # only a training step asks
        rows = train_dataset.select(range(args.process_index, len(train_dataset), args.world_size))
        return [(row["input_ids"][: row["prompt_length"]], row["row"]) for row in rows]

    pad = collator.pad_token_id
    return Rollouts(
        collator=collator,
        buffer=ReplayBuffer(replay_capacity(args), seed=args.seed, rank=args.process_index),
        student=answers(student, engine or _local_engine(args, student, autocast, pad)),
        teacher=answers(lambda: teacher, _local_engine(args, lambda: teacher, contextlib.nullcontext, pad)),
        prompts_of_rows=prompts_of_this_process,
        gather=gather_object if args.world_size > 1 else list,
        seed=args.seed,
        device=args.device,
    )


def _local_engine(
    args: DistillationConfig, model: Callable[[], Any], context: Callable[[], Any], pad_token_id: int
) -> LocalEngine:
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batch_size = args.generation_batch_size or step
    return LocalEngine(model, shares_weights=True, pad_token_id=pad_token_id, batch_size=batch_size, context=context)


# ---- the teacher's part


def make_compression(
    args: DistillationConfig, cache: TeacherCache | None, vocab_size: int
) -> CompressionSettings | None:
    """The compression of the run's teacher, None where its logits are used as they are.

    Raises:
        ValueError: what the configuration asks for cannot be had from the cache.
    """
    if cache is not None:
        return compression_of_cache(
            cache, vocab_size=vocab_size, reuse=args.reuse_teacher_logits, temperatures=args.teacher_temperatures,
            divergence=args.divergence, alpha=args.alpha, tail=args.tail, temperature=args.temperature,
        )  # fmt: skip
    if args.reuse_teacher_logits != "off":
        return CompressionSettings(
            vocab_size, args.reuse_k, args.reuse_teacher_logits, args.reuse_codec, args.teacher_temperatures,
            labels=False, seed=args.seed,
        )  # fmt: skip
    if args.tail is not None:
        raise ValueError(
            f"tail: says how compressed teacher logits are read, and the teacher's are not compressed; set "
            f"reuse_teacher_logits or leave it out, got {args.tail!r}"
        )
    return None


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
) -> TeacherSource:
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


# ---- plain text


def make_plain_text(
    args: DistillationConfig, dataset: Dataset | None, tokenizer: Any, student: Any, collator: DistillationCollator
) -> PlainTextBatches | None:
    """Batches of the language-modelling term, from the data set given or the one that the configuration names; None
    where there is neither, or no weight."""
    if dataset is None and args.lm_dataset is None:
        return None
    source = args.lm_dataset or "lm_dataset"
    rows = load_rows(source) if dataset is None else dataset
    blocks = pack_text(rows, tokenizer, max_length=args.max_length, source=source)
    check_token_ids(((block, None) for block in blocks), f"{source} in blocks", tokenizer, models={"student": student})
    if args.lm_weight == 0:
        return None
    return PlainTextBatches(
        blocks,
        collator,
        batch_size=args.per_device_train_batch_size,
        micro_batches=args.gradient_accumulation_steps,
        seed=args.seed,
        rank=args.process_index,
        world_size=args.world_size,
        device=args.device,
    )
