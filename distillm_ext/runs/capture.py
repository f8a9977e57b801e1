"""`distillm capture` from settings to a finished cache: teacher, rows, processes."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from distillm_ext._codec import MAX_K
from distillm_ext.compression import checked_temperatures
from distillm_ext.data.batches import DistillationCollator, move_batch
from distillm_ext.data.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH
from distillm_ext.data.rows.checks import checked_template_kwargs
from distillm_ext.data.rows.loading import load_rows
from distillm_ext.data.rows.origin import keep_origin, name_row, origin_of
from distillm_ext.data.tokenise import prepare_dataset
from distillm_ext.generation.positions import check_positions
from distillm_ext.models.frozen_teacher import TEACHER_DTYPES, ModelTeacher
from distillm_ext.models.loading import load_teacher, load_tokenizer
from distillm_ext.models.teacher_records import compute_compressed
from distillm_ext.models.vocabulary import check_dataset_ids, compared_vocabulary, padding_id, tokenizer_size
from distillm_ext.packing import CODECS
from distillm_ext.record_format import METHODS
from distillm_ext.runs.capture_rows import CaptureCount, capture_rows
from distillm_ext.runs.settings import DatasetSettings
from distillm_ext.teacher import (
    CacheSpec,
    CacheWriter,
    CompressionSettings,
    fingerprint_dataset,
    fingerprint_model,
    fingerprint_tokenizer,
    finish_cache,
)

# A process that is done waits for the others, however long they take.
_PATIENCE = datetime.timedelta(days=30)


@dataclass(frozen=True)
class CaptureSettings:
    """What to capture.

    Attributes:
        teacher: folder, hub name, .gguf file, or the mapping of a settings file.
        dataset: where the rows come from; validation rows are captured too where they are named.
        out: folder of the cache.
        k, method, codec, temperatures, seed: the compression, see `distillm_ext.compress_logits` and `pack`.
        max_prompt_length, max_length, chat_template_kwargs: as in the run that will read the cache.
        batch_size: rows a teacher forward.
        dtype: of the teacher; "auto" is its checkpoint's.
        rows: take the first N rows of the training split; 0 takes all.
        shard_mib: size of a shard.
        flush_seconds: the longest time whose work a kill can lose.
    """

    teacher: str | dict[str, Any]
    dataset: DatasetSettings
    out: Path
    k: int = 64
    method: str = "topk"
    codec: str = "q8"
    temperatures: tuple[float, ...] = (1.0,)
    seed: int = 0
    max_prompt_length: int = MAX_PROMPT_LENGTH
    max_length: int = MAX_LENGTH
    batch_size: int = 8
    dtype: str = "float32"
    rows: int = 0
    shard_mib: int = 64
    flush_seconds: float = 300.0
    chat_template_kwargs: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        # Before a teacher is loaded, which may take minutes.
        _check_choice("method", self.method, METHODS)
        _check_choice("codec", self.codec, CODECS)
        _check_choice("dtype", self.dtype, tuple(TEACHER_DTYPES))
        least = {"k": 1, "max_prompt_length": 1, "max_length": 2, "batch_size": 1, "rows": 0, "shard_mib": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be at least {low}, got {getattr(self, name)}")
        if self.k > MAX_K:
            raise ValueError(f"k: must be at most {MAX_K}, got {self.k}")
        if not self.flush_seconds >= 0:
            raise ValueError(f"flush_seconds: must not be negative, got {self.flush_seconds}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out: expected a folder, new or of a cache; {self.out} is a file")
        checked_temperatures(self.temperatures)
        checked_template_kwargs(self.chat_template_kwargs)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class Processes:
    """This process among those of a launcher (torchrun, accelerate launch), or alone."""

    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))
    world_size: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    local_rank: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", "0")))

    def start(self) -> None:
        """Joins the others. They only wait for each other, so gloo serves every device."""
        if self.world_size > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=_PATIENCE)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def capture(
    settings: CaptureSettings,
    *,
    processes: Processes,
    progress: Callable[[CaptureCount, int], None] | None = None,
) -> CaptureCount:
    """Captures a data set's teacher logits into a cache; every process of a launcher calls it.

    Args:
        settings: what to capture.
        processes: this process among the others.
        progress: called after each batch with what this process has done, and the rows of its share.

    Returns:
        What this process did. The cache is finished when the function returns on the first process.

    Raises:
        CacheMismatch: the folder holds a cache that was made otherwise.
        FloatingPointError: the teacher's logits at a target are NaN or +inf, or −inf throughout. Nothing of that row is
            stored; what was captured before stays, and the same call goes on from there.
        FileNotFoundError, ValueError: settings, rows or models that cannot be used.
    """
    processes.start()
    tokenizer = load_tokenizer(settings.teacher)
    splits = prepared_splits(settings, tokenizer)
    rows = concatenate_datasets(splits)
    teacher = ModelTeacher(load_teacher(settings.teacher, settings.dtype), device=processes.device)
    check_dataset_ids(rows, "dataset", tokenizer, models={"teacher": teacher.model})
    check_positions({"teacher": teacher.model}, settings.max_length, rows={"dataset": rows})
    teacher.verify(rows[0]["input_ids"][:16])
    spec = cache_spec(settings, teacher.model, tokenizer, rows)
    compress = TeacherRecords(teacher, spec.compression, tokenizer, name=lambda row: row_name(splits, row))
    share = len(range(processes.rank, len(rows), processes.world_size))
    with CacheWriter(settings.out, spec, rank=processes.rank, shard_bytes=settings.shard_mib << 20) as writer:
        processes.wait()  # all have seen what was there before anyone adds to it
        count = capture_rows(
            rows, writer, compress, batch_size=settings.batch_size, rank=processes.rank,
            world_size=processes.world_size, flush_seconds=settings.flush_seconds,
            progress=None if progress is None else lambda done: progress(done, share),
        )  # fmt: skip
    processes.wait()
    if processes.rank == 0:
        finish_cache(settings.out, spec)
    processes.wait()
    return count


def token_rows(settings: CaptureSettings, tokenizer: Any) -> Dataset:
    """Training rows and, where they are named, validation rows, tokenised as the trainer does."""
    return concatenate_datasets(prepared_splits(settings, tokenizer))


def prepared_splits(settings: CaptureSettings, tokenizer: Any) -> list[Dataset]:
    """The parts of `token_rows`."""
    source = settings.dataset
    splits = [(source.train, source.train_split)]
    if source.eval is not None or source.eval_split is not None:
        splits.append((source.eval or source.train, source.eval_split or "train"))
    prepared: list[Dataset] = []
    for name, split in splits:
        rows = load_rows(name, split=split, subset=source.subset, columns=source.columns, need_responses=True)
        if settings.rows and not prepared:
            rows = keep_origin(rows.select(range(min(settings.rows, len(rows)))), rows)
        prepared.append(
            prepare_dataset(
                rows,
                tokenizer,
                max_prompt_length=settings.max_prompt_length,
                max_length=settings.max_length,
                source=Path(name).name,
                chat_template_kwargs=checked_template_kwargs(settings.chat_template_kwargs),
            )  # fmt: skip
        )
    if sum(map(len, prepared)) == 0:
        raise ValueError(f"dataset: {source.train} has no row with a response; there is nothing to capture")
    return prepared


def row_name(splits: Sequence[Dataset], row: int) -> str:
    """A row of the splits put together, by its number (0-based) in its split, and its file and line where known."""
    for split in splits:
        if row < len(split):
            return name_row(row, origin_of(split)(row))
        row -= len(split)
    raise IndexError(f"row: {row} rows past the last split")


def cache_spec(settings: CaptureSettings, teacher: Any, tokenizer: Any, rows: Dataset) -> CacheSpec:
    """The cache's settings. Of the teacher's vocabulary only entries that the tokenizer can name are looked at."""
    return CacheSpec(
        CompressionSettings(
            compared_vocabulary(tokenizer, teacher=teacher),
            settings.k,
            settings.method,
            settings.codec,
            settings.temperatures,
            seed=settings.seed,
        ),
        teacher=fingerprint_model(teacher),
        tokenizer=fingerprint_tokenizer(tokenizer),
        dataset=fingerprint_dataset(rows),
        details={
            "teacher": settings.teacher,
            "dataset": dataclasses.asdict(settings.dataset),
            "tokenizer_size": tokenizer_size(tokenizer),
            "max_prompt_length": settings.max_prompt_length,
            "max_length": settings.max_length,
            "chat_template_kwargs": checked_template_kwargs(settings.chat_template_kwargs),
            "dtype": str(next(teacher.parameters()).dtype).removeprefix("torch."),
        },
    )


class TeacherRecords:
    """Rows of tokens → packed records of their targets, on the host."""

    def __init__(
        self,
        teacher: ModelTeacher,
        settings: CompressionSettings,
        tokenizer: Any,
        name: Callable[[int], str] = "row {}".format,
    ) -> None:
        self.teacher = teacher
        self.settings = settings
        self.name = name
        self.collator = DistillationCollator(padding_id(tokenizer, teacher.model))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        features = [{**row, "row": number} for number, row in enumerate(rows)]
        inputs = move_batch(self.collator(features), self.teacher.device)
        compressed = compute_compressed(self.teacher, self.settings, inputs, range(len(rows)))
        self._check(rows, inputs["row_targets"], compressed.valid.cpu())
        return self.settings.pack(compressed).cpu().numpy()

    def _check(self, rows: Sequence[Mapping[str, Any]], counts: Sequence[int], valid: torch.Tensor) -> None:
        parts = zip(rows, valid.split(list(counts)), strict=True)
        bad = [self.name(row["row"]) for row, part in parts if not bool(part.all())]
        if bad:
            more = f" and {len(bad) - 5} more rows of the same batch" if len(bad) > 5 else ""
            raise FloatingPointError(
                f"the teacher's logits are NaN or inf in {'; '.join(bad[:5])}{more}. Nothing of this batch is stored; "
                "what was captured before stays, and the same command goes on from there. Check the teacher's weights; "
                "if its dtype is float16, whose range is small, take float32 or bfloat16; else leave these rows out"
            )
