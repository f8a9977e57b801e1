"""`distillm evaluate`: metrics of a model on held-out rows, with and without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from distillm_ext.cli.options import DATASET_HELP, DTYPE_HELP, expanded
from distillm_ext.data.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH

NOT_FINITE = 1


def evaluate(
    model: Annotated[
        str, typer.Argument(callback=expanded, help="Folder, hub name or .gguf file of the model to measure.")
    ],
    dataset: Annotated[str, typer.Option(callback=expanded, help=f"{DATASET_HELP}, with held-out rows.")],
    teacher: Annotated[
        str | None, typer.Option(callback=expanded, help="Model to compare with: folder, hub name or .gguf file.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set; slices as train[:100] are allowed.")] = "train",
    rows: Annotated[int, typer.Option(min=0, help="Take the first N rows; 0 takes all.")] = 0,
    generate: Annotated[int, typer.Option(min=0, help="Generate responses to the first N rows for ROUGE-L.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the generated responses; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the generated responses.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_prompt_length: Annotated[
        int, typer.Option(min=1, help="Longer prompts lose their beginning.")
    ] = MAX_PROMPT_LENGTH,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"Most tokens of prompt and response; {MAX_LENGTH}, or fewer where a model has fewer positions.",
        ),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help='As in training, for example {"enable_thinking": false}.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a generated response.")] = 128,
    dtype: Annotated[str, typer.Option(help=f"Of both models: {DTYPE_HELP}")] = "float32",
    output: Annotated[Path | None, typer.Option(callback=expanded, help="Write the metrics to this JSON file.")] = None,
) -> None:
    """Measure KL to the teacher, cross-entropy, top-1 agreement and ROUGE-L on held-out rows.

    A metric that is NaN or inf ends the command with code 1, after the JSON file is written.
    """
    import torch
    from rich.console import Console

    from distillm_ext.cli.errors import friendly_errors
    from distillm_ext.cli.tables import print_results, report_progress
    from distillm_ext.evaluation.metrics import evaluate_student
    from distillm_ext.generation import SamplingParams
    from distillm_ext.generation.positions import check_positions, length_within

    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with friendly_errors():
        student, other, tokenizer = _load(model, teacher, dtype, device)
        models = {"model": student, "teacher": other}
        most = length_within(models, MAX_LENGTH) if max_length is None else max_length
        tokens = _rows(dataset, split, rows, tokenizer, max_prompt_length, most, chat_template_kwargs)
        check_positions(models, most, setting="--max-length", rows={Path(dataset).name: tokens})
        with report_progress(console) as progress:
            result = evaluate_student(
                student,
                tokens,
                tokenizer,
                teacher=other,
                batch_size=batch_size,
                generate_rows=generate,
                max_new_tokens=max_new_tokens,
                max_length=most,
                sampling=SamplingParams(temperature=temperature),
                seed=seed,
                progress=progress,
            )
        if output is not None:
            named = {"model": model, "teacher": teacher, "dataset": dataset, "split": split}
            _write(output, {**named, **result.as_dict(), "not_finite": result.not_finite})
    print_results(console, {model: result})
    console.print(f"{result.rows} rows, {result.tokens} response tokens", highlight=False, soft_wrap=True)
    if result.not_finite:
        typer.echo(f"error: {_broken(result.not_finite, teacher)}", err=True)
        raise typer.Exit(NOT_FINITE)


def _broken(metrics: list[str], teacher: str | None) -> str:
    models = "the model" if teacher is None or "cross_entropy" in metrics else "the teacher, or the model,"
    return (
        f"{', '.join(metrics)}: NaN or inf, null in the JSON file. The logits of {models} are NaN or inf on some rows: "
        "check its weights, and its dtype if that is float16"
    )


def _load(model: str, teacher: str | None, dtype: str, device: str) -> tuple[Any, Any, Any]:
    from distillm_ext.models.loading import check_same_tokens, load_teacher, load_tokenizer

    tokenizer = load_tokenizer(model)
    # The measured model is only read: it loads as a teacher does, in evaluation mode and without gradients.
    student: Any = load_teacher(model, dtype)
    if teacher is None:
        return student.to(device), None, tokenizer
    check_same_tokens(tokenizer, load_tokenizer(teacher))
    other: Any = load_teacher(teacher, dtype)
    return student.to(device), other.to(device), tokenizer


def _rows(
    dataset: str, split: str, rows: int, tokenizer: Any, max_prompt_length: int, max_length: int, kwargs: str | None
) -> Any:
    from distillm_ext.data.rows.checks import checked_template_kwargs
    from distillm_ext.data.tokenise import load_rows, prepare_dataset

    raw = load_rows(dataset, split=split, need_responses=True)
    if rows:
        raw = raw.select(range(min(rows, len(raw))))
    return prepare_dataset(
        raw, tokenizer, max_prompt_length=max_prompt_length, max_length=max_length, source=Path(dataset).name,
        chat_template_kwargs=checked_template_kwargs(kwargs),
    )  # fmt: skip


def _write(output: Path, values: dict[str, Any]) -> None:
    import json

    from distillm_ext.files import write_text

    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
