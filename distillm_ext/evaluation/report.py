"""`report.md`: what was run, with which settings, where, and what came of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillm_ext.evaluation.metrics import EvaluationResult
from distillm_ext.files import write_text

# attribute, heading, format, whether less is better
COLUMNS = (
    ("kl", "KL to teacher ↓", "{:.3f}"),
    ("cross_entropy", "cross-entropy ↓", "{:.3f}"),
    ("agreement", "top-1 agreement ↑", "{:.3f}"),
    ("rouge_l", "ROUGE-L ↑", "{:.1f}"),
)


@dataclass
class Report:
    """Everything a report shows.

    Attributes:
        title: heading.
        results: model name → metrics, in the order of the table.
        settings: the run's configuration, nested mappings allowed.
        notes: paragraphs below the table.
        plot: picture file, named relative to the report.
        samples: (prompt, {model name: response}) pairs.
    """

    title: str
    results: Mapping[str, EvaluationResult]
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    plot: str | None = None
    samples: Sequence[tuple[str, Mapping[str, str]]] = field(default_factory=list)


def table_rows(results: Mapping[str, EvaluationResult]) -> list[list[str]]:
    """Cells of the table, heading first; a metric that was not measured is a dash."""
    shown = [column for column in COLUMNS if any(result.measured(column[0]) for result in results.values())]
    rows = [["model", *(heading for _, heading, _ in shown)]]
    for name, result in results.items():
        cells = (form.format(getattr(result, key)) if result.measured(key) else "–" for key, _, form in shown)
        rows.append([name, *cells])
    return rows


def environment() -> dict[str, str]:
    """Versions and hardware that the numbers were taken on."""
    import torch
    import transformers

    from distillm_ext import build_info

    info = build_info()
    return {
        "distillm_ext": str(info["version"]),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPU instruction set": str(info["cpu_isa"]),
        "threads": str(torch.get_num_threads()),
        "CUDA kernels": "loaded" if info["cuda_loaded"] else f"not loaded ({info['cuda_reason']})",
    }


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report as Markdown, to a temporary name first.

    Raises:
        ValueError: no result to show.
    """
    if not report.results:
        raise ValueError("report.results: expected at least one model's metrics, got none")
    any_result = next(iter(report.results.values()))
    parts = [f"# {report.title}", _markdown_table(table_rows(report.results))]
    parts.append(
        f"Token metrics: {any_result.rows} held-out rows, {any_result.tokens} response tokens, nats per token. "
        f"ROUGE-L F × 100: responses to {any_result.generated_rows} of them."
    )
    parts += report.notes
    if report.plot:
        parts.append(f"![losses, φ, batch sources and time shares over steps]({report.plot})")
    if report.samples:
        parts.append("## Responses")
        parts += [_sample(prompt, responses) for prompt, responses in report.samples]
    parts += ["## Settings", _fenced(_yaml(report.settings), "yaml")]
    parts += ["## Environment", _markdown_table([["what", "value"], *map(list, environment().items())])]
    return write_text(path, "\n\n".join(parts) + "\n")


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    rule = "|" + "|".join([" --- ", *([" ---: "] * (len(cells[0]) - 1))]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _fenced(text: str, language: str = "") -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def _sample(prompt: str, responses: Mapping[str, str]) -> str:
    lines = [f"prompt: {prompt.strip()}", *(f"--- {name}\n{text.strip()}" for name, text in responses.items())]
    return _fenced("\n".join(lines), "text")
