"""Tables and progress of metrics at the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from distillm_ext.evaluation.metrics import EvaluationResult
from distillm_ext.evaluation.report import table_rows
from distillm_ext.runs.progress import make_progress


def print_results(console: Console, results: Mapping[str, EvaluationResult]) -> None:
    """One line per model."""
    heading, *rows = table_rows(results)
    table = Table()
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def report_progress(console: Console, description: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage, for functions that call back with (stage, done, total); silent without a terminal."""
    with make_progress(console) as progress:
        tasks: dict[str, object] = {}

        def update(stage: str, done: int, total: int) -> None:
            if not console.is_terminal:
                return
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"{description}{stage}", total=total, note="")
            progress.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        yield update
