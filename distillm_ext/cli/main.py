"""The command line application. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from distillm_ext import __version__
from distillm_ext.cli.capture import capture
from distillm_ext.cli.demo import demo
from distillm_ext.cli.errors import TRACEBACK
from distillm_ext.cli.evaluate import evaluate
from distillm_ext.cli.info import info
from distillm_ext.cli.train import train

app = typer.Typer(
    name="distillm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large language model.",
    epilog=f"With {TRACEBACK}=1 in the environment an error shows its whole traceback.",
)
app.command()(train)
app.command()(capture)
app.command()(evaluate)
app.command()(demo)
app.command()(info)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil a large language model into a small one."""


if __name__ == "__main__":
    app()
