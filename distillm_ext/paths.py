"""Paths as people write them: `~` is the home folder, `$NAME` and `${NAME}` are environment variables."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*))")


def expand_path(path: str | os.PathLike[str], name: str) -> str:
    """A path with `~`, `~user` and environment variables replaced, once.

    A path that exists as it is written stays as it is, so a file whose name holds a dollar sign can be named. What a
    variable holds is taken literally, but for a leading `~`.

    Args:
        path: a file, a folder, or a name that is none (of a model on the hub): text without `~` and `$` comes back
            unchanged.
        name: what to call the path in messages, the argument or setting it came from.

    Raises:
        ValueError: an environment variable that is not set, or a user without home folder.

    Example:
        >>> expand_path("~/runs/$USER", "output_dir")  # doctest: +SKIP
        '/home/ada/runs/ada'
    """
    text = os.fspath(path)
    if not ("~" in text or "$" in text) or os.path.lexists(text):
        return text

    def value(found: re.Match[str]) -> str:
        variable = found["braced"] if found["braced"] is not None else found["plain"]
        if variable not in os.environ:
            raise ValueError(
                f"{name}: the environment variable {variable!r} of {text!r} is not set; set it, or write the path out"
            )
        return os.environ[variable]

    expanded = os.path.expanduser(_VARIABLE.sub(value, text))
    if expanded.startswith("~"):
        raise ValueError(f"{name}: {text!r} names the home folder of a user that is not known; write the path out")
    return expanded
