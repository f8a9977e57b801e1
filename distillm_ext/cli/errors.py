"""Errors of the user's making end a command with one sentence, not with a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRACEBACK = "DISTILLM_TRACEBACK"
# What bad settings, files and rows raise, beside the project's own classes; and so does many a defect.
_OTHERS = (ValueError, TypeError, OSError)


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Turn the errors that bad settings, files and rows raise into a message and exit code 2.

    A class of the project's own says what is wrong with what was given. Any other may be a defect as well: its message
    is followed by how to see the traceback. What is neither, and everything while `DISTILLM_TRACEBACK=1`, propagates.

    Example:
        >>> with friendly_errors():
        ...     settings = load_settings("run.yaml")
    """
    import typer

    try:
        yield
    except Exception as error:
        own = type(error).__module__.split(".")[0] == __name__.split(".")[0]
        if os.environ.get(TRACEBACK) == "1" or not (own or isinstance(error, _OTHERS)):
            raise
        print(f"error: {error}", file=sys.stderr)
        if not own:
            print(f"({type(error).__name__}; {TRACEBACK}=1 shows where it comes from)", file=sys.stderr)
        raise typer.Exit(2) from error
