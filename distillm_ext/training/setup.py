"""What is checked and prepared once, before a run: processes, data sets, vocabularies, objectives."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from distillm_ext.data.batches import DistillationCollator
from distillm_ext.data.chat.templates import template_ends
from distillm_ext.data.plain_text import PlainTextBatches, pack_text
from distillm_ext.data.rows.loading import TOKEN_COLUMNS, load_rows
from distillm_ext.data.rows.origin import keep_origin
from distillm_ext.data.tokenise import prepare_dataset
from distillm_ext.generation import Engine, LocalEngine, full_weights
from distillm_ext.generation.ends import end_token_ids, name_ends
from distillm_ext.generation.positions import check_positions
from distillm_ext.models.frozen_teacher import ModelTeacher
from distillm_ext.models.student_forward import StudentForward
from distillm_ext.models.vocabulary import check_token_ids
from distillm_ext.training.config import DistillationConfig
from distillm_ext.training.objectives import CrossEntropyObjective, DivergenceObjective, Objective, ObjectiveSchedule
from distillm_ext.training.rollouts.policies import reads_responses
from distillm_ext.training.rollouts.replay import ReplayBuffer
from distillm_ext.training.rollouts.responses import EngineResponses
from distillm_ext.training.rollouts.rollouts import Rollouts

logger = logging.getLogger(__name__)


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


def needs_responses(args: DistillationConfig) -> bool:
    """Whether some step of the run trains on responses of its training set."""
    return reads_responses(args.policy, mixed_fraction=args.mixed_fraction, warmup_steps=args.warmup_objective_steps)


def prepare_train(dataset: Dataset | None, tokenizer: Any, args: DistillationConfig) -> Dataset | None:
    """`prepare_split` for the training set, whose rows need responses only where a step of the policy reads them."""
    return prepare_split(dataset, tokenizer, args, "train_dataset", prompts_only=not needs_responses(args))


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


def verify_heads(dataset: Any, teacher: ModelTeacher | None, student: StudentForward) -> None:
    """Checks on a few tokens of the data that backbones and heads, used apart, give the models' own logits, and what
    the student adds to its loss by itself."""
    if not isinstance(dataset, Dataset):
        return
    probe = dataset[0]["input_ids"][:16]
    if teacher is not None:
        teacher.verify(probe)
    # A student that is still to be materialised cannot run yet; its split is trusted.
    if any(parameter.is_meta for parameter in student.model.parameters()):
        student.own.trust_configuration()
        return
    student.reader.verify(probe, "student")
    student.own.probe(probe, "student")


def load_plain_text(
    args: DistillationConfig, dataset: Dataset | None, tokenizer: Any, student: Any
) -> list[np.ndarray] | None:
    """Token blocks of the plain-text term, from the data set given or the one named in the configuration, or None."""
    if dataset is None and args.lm_dataset is None:
        return None
    source = args.lm_dataset or "lm_dataset"
    rows = load_rows(source) if dataset is None else dataset
    blocks = pack_text(rows, tokenizer, max_length=args.max_length, source=source)
    check_token_ids(((block, None) for block in blocks), f"{source} in blocks", tokenizer, models={"student": student})
    return blocks


def response_ends(
    args: DistillationConfig, tokenizer: Any, models: Mapping[str, Any], train_dataset: Any
) -> tuple[int, ...]:
    """Tokens that end the responses of student and teacher (`end_token_ids`). The student's generation config names
    them from now on, so the saved model stops where it was taught to."""
    more = template_ends(tokenizer, args.template_kwargs) if has_prompts_alone(train_dataset) else ()
    ends = end_token_ids(tokenizer, models, train_dataset, max_length=args.max_length, more=more)
    name_ends(models["student"], ends)
    return ends


def has_prompts_alone(rows: Any) -> bool:
    """Whether some of the token rows have no response."""
    if not isinstance(rows, Dataset):
        return False
    table = rows.select_columns(["input_ids", "prompt_length"]).with_format("arrow")[:]
    lengths = pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()
    return bool((lengths == table["prompt_length"].to_numpy()).any())


def check_lengths(args: DistillationConfig, models: Mapping[str, Any], datasets: Mapping[str, Any]) -> None:
    """Refuses texts that a model of the run cannot read to their end (`check_positions`), and prompts of token rows
    that leave no room for a response where the policy generates one.

    Raises:
        ValueError: names model and limit, and the setting or the row.
    """
    rows: dict[str, Any] = {}
    for name, dataset in datasets.items():
        rows |= {f"{name}[{k}]": d for k, d in dataset.items()} if isinstance(dataset, dict) else {name: dataset}
    check_positions(models, args.max_length, rows=rows)
    train = datasets["train_dataset"]
    if args.policy != "dataset" and set(TOKEN_COLUMNS) <= set(getattr(train, "column_names", None) or ()):
        lengths = train.select_columns(["prompt_length"]).with_format("numpy")[:]["prompt_length"]
        full = np.flatnonzero(lengths >= args.max_length)
        if len(full):
            raise ValueError(
                f"train_dataset: the prompt of row {full[0] + 1} has {lengths[full[0]]} tokens, which leave no room "
                f"for a response within max_length={args.max_length}; shorten it, or raise max_length"
            )


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


def sum_over_processes(accelerator: Any, mine: Mapping[str, float]) -> dict[str, float]:
    """Numbers of this process, each summed over all; every process calls it, with the same names."""
    if not mine:
        return {}
    values = torch.tensor([list(mine.values())], dtype=torch.float64, device=accelerator.device)
    return dict(zip(mine, accelerator.gather(values).sum(dim=0).tolist(), strict=True))


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
    engine: Engine | None = None,
) -> Rollouts:
    """Buffer, response sources and batches as the configuration wants them; `engine` generates for the student."""

    def local(model: Callable[[], Any], context: Callable[[], Any]) -> LocalEngine:
        return LocalEngine(
            model,
            shares_weights=True,
            pad_token_id=collator.pad_token_id,
            batch_size=args.generation_batch_size
            or args.per_device_train_batch_size * args.gradient_accumulation_steps,
            context=context,
        )

    def answers(engine: Engine, model: Callable[[], Any]) -> EngineResponses:
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

    return Rollouts(
        collator=collator,
        buffer=ReplayBuffer(replay_capacity(args), seed=args.seed, rank=args.process_index),
        student=answers(engine or local(student, autocast), student),
        teacher=answers(local(lambda: teacher, contextlib.nullcontext), lambda: teacher),
        prompts_of_rows=prompts_of_this_process,
        gather=gather_object if args.world_size > 1 else list,
        seed=args.seed,
        device=args.device,
    )


def make_plain_text(
    args: DistillationConfig, blocks: list[np.ndarray] | None, collator: DistillationCollator
) -> PlainTextBatches | None:
    """The plain-text term's batches, or None where it has no text or no weight."""
    if blocks is None or args.lm_weight == 0:
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
