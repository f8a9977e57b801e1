"""Errors of the user's making end a command with one sentence, not with a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn the errors that bad settings, files and rows raise into a message and exit code 2.

    Everything else, and everything while `DISTILLM_TRACEBACK=1`, propagates: a defect must keep its traceback.
    """
    import os

    import typer

    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("DISTILLM_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
