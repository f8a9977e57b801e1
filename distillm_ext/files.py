"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: str | Path) -> None:
    """Forces a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_into_place(temporary: Path, target: Path) -> None:
    """Gives a file that was written to a temporary name, closed, its own, and replaces what has that name.

    The content is on the disk before the name, and the name before this returns: whenever the process or the power
    ends, `target` is what it was or the whole new file. Both names must lie on one file system: give the temporary one
    in the target's folder.

    Example:
        >>> temporary = target.with_name(target.name + ".tmp")
        >>> temporary.write_bytes(content)
        >>> move_into_place(temporary, target)
    """
    sync_path(temporary)
    os.replace(temporary, target)
    sync_path(target.parent)


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text to a temporary name beside `path` and moves it into place."""
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    move_into_place(temporary, target)
    return target
