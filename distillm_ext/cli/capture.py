"""`distillm capture`: run the teacher over a data set once and keep its output, compressed, in a cache on disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from distillm_ext._codec import MAX_K
from distillm_ext.cli.options import DATASET_HELP, DTYPE_HELP, expanded
from distillm_ext.data.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH

INTERRUPTED = 130
STOPPED_BY_NAN = 1
# Seconds between lines where there is no terminal.
_LINE_EVERY = 10.0


def capture(
    out: Annotated[
        Path,
        typer.Option(callback=expanded, help="Folder of the cache. One that was begun with the same settings goes on."),
    ],
    teacher: Annotated[
        str | None, typer.Option(callback=expanded, help="Folder, hub name or .gguf file of the teacher.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(callback=expanded, help=f"{DATASET_HELP}, with the training rows.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            help="Settings file of `distillm train`: teacher, dataset and lengths not given here are its.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set; slices as train[:100] are allowed.")] = "train",
    eval_dataset: Annotated[
        str | None, typer.Option("--eval", callback=expanded, help="Validation rows, captured into the same cache.")
    ] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split of the validation rows.")] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column's name in the source. Repeatable.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Take the first N training rows; 0 takes all.")] = 0,
    k: Annotated[int, typer.Option(min=1, max=MAX_K, help="Entries kept, or drawn, per position.")] = 64,
    method: Annotated[str, typer.Option(help="topk, or sample (k draws).")] = "topk",
    codec: Annotated[str, typer.Option(help="q4, q6, q8, fp16 or exact: how log-probabilities are stored.")] = "q8",
    temperatures: Annotated[str, typer.Option(help="Temperatures of the losses to come, as 1.0,2.0.")] = "1.0",
    seed: Annotated[int, typer.Option(help="Of the draws of method sample.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a teacher forward.")] = 8,
    max_prompt_length: Annotated[int | None, typer.Option(min=1, help=f"As in training; {MAX_PROMPT_LENGTH}.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help=f"As in training; {MAX_LENGTH}.")] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help='As in training, for example {"enable_thinking": false}.')
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the teacher: {DTYPE_HELP}")] = "float32",
    shard_mib: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 64,
    flush_seconds: Annotated[float, typer.Option(min=0.0, help="The longest time whose work a kill can lose.")] = 300.0,
) -> None:
    """Keep a teacher's output for a data set on disk: training from the cache needs no teacher.

    The cache is the teacher of a settings file (teacher: FOLDER). On several processes, each with shards of its own:
    torchrun --nproc_per_node N --no-python distillm capture ...
    """
    from rich.console import Console

    from distillm_ext.cli.errors import friendly_errors

    values = {name: value for name, value in locals().items() if name not in ("Console", "friendly_errors")}
    with friendly_errors():
        settings = _settings(**values)
    raise typer.Exit(run(settings, Console()))


def run(settings: Any, console: Any) -> int:
    """Capture; the exit code is `INTERRUPTED` after Ctrl-C, `STOPPED_BY_NAN` where the teacher gives NaN or inf."""
    import sys

    from distillm_ext.cli.errors import friendly_errors
    from distillm_ext.runs.capture import Processes, capture
    from distillm_ext.teacher import TeacherCache

    processes = Processes()
    console.quiet = processes.rank != 0
    console.print("loading teacher and rows …")
    bar = _Bar(console)
    try:
        with friendly_errors():
            count = capture(settings, processes=processes, progress=bar)
    except KeyboardInterrupt:
        console.print("stopped. The same command goes on from here")
        return INTERRUPTED
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return STOPPED_BY_NAN
    finally:
        bar.close()
    if processes.rank == 0:
        cache = TeacherCache.open(settings.out)
        positions = cache.manifest.positions
        size = sum(shard.bytes for shard in cache.manifest.shards)
        console.print(
            f"{settings.out}: {len(cache)} rows, {positions} tokens, {size / 2**20:.1f} MiB, "
            f"{size / max(positions, 1):.0f} bytes per token; this process captured {count.rows - count.found} rows "
            f"({count.tokens_per_second:.0f} tokens/s) and found {count.found}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return 0


class _Bar:
    """Progress with rate and time left: a bar at a terminal, else a line now and then."""

    def __init__(self, console: Any) -> None:
        self.console = console
        self._progress: Any = None
        self._task: Any = None
        self._next_line = 0.0

    def __call__(self, count: Any, total: int) -> None:
        rate = f"{count.tokens_per_second:.0f} tokens/s"
        if self.console.is_terminal and not self.console.quiet:
            if self._progress is None:
                from distillm_ext.runs.progress import make_progress

                self._progress = make_progress(self.console)
                self._progress.start()
                self._task = self._progress.add_task("capturing", total=total, completed=count.found, note="")
            self._progress.update(self._task, completed=count.rows, note=rate)
        elif time.monotonic() >= self._next_line or count.rows == total:
            self._next_line = time.monotonic() + _LINE_EVERY
            computed = max(count.rows - count.found, 1)
            left = count.seconds / computed * (total - count.rows)
            self.console.print(
                f"captured {count.rows}/{total} rows ({count.found} were there): {rate}, {left:.0f} s left",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

    def close(self) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _settings(
    *,
    config: Path | None,
    teacher: str | None,
    dataset: str | None,
    split: str,
    eval_dataset: str | None,
    eval_split: str | None,
    subset: str | None,
    column: list[str] | None,
    temperatures: str,
    max_prompt_length: int | None,
    max_length: int | None,
    chat_template_kwargs: str | None,
    **same: Any,
) -> Any:
    from distillm_ext.runs.capture import CaptureSettings
    from distillm_ext.runs.settings import DatasetSettings, load_settings

    whole = load_settings(config) if config is not None else None
    training = whole.training if whole is not None else {}
    source = whole.teacher if whole is not None else None
    if isinstance(source, dict):
        source = {name: value for name, value in source.items() if name != "cache"}
    rows_of = whole.dataset if whole is not None else None
    if dataset is not None:
        rows_of = DatasetSettings(dataset, eval_dataset, split, eval_split, subset, _columns(column))
    model = teacher or source
    if not model or rows_of is None:
        raise ValueError(f"{'--dataset' if model else '--teacher'}: is missing, and so is a --config that names it")
    return CaptureSettings(
        teacher=model,
        dataset=rows_of,
        temperatures=_numbers(temperatures),
        max_prompt_length=max_prompt_length or training.get("max_prompt_length", MAX_PROMPT_LENGTH),
        max_length=max_length or training.get("max_length", MAX_LENGTH),
        chat_template_kwargs=chat_template_kwargs or training.get("chat_template_kwargs"),
        **same,
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--temperatures: expected numbers separated by commas, got {text!r}") from None


def _columns(pairs: list[str] | None) -> dict[str, str]:
    for pair in pairs or []:
        if "=" not in pair:
            raise ValueError(f"--column: expected OURS=THEIRS, as prompt=instruction; got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs or [])
