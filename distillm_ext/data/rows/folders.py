"""The data files of a folder, so that none is left out without a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)
_KINDS = {
    ".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON", ".parquet": "Parquet", ".csv": "CSV", ".tsv": "CSV",
    ".arrow": "Arrow",
}  # fmt: skip
# What libraries write beside data.
_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder and those below it, compressed ones too; none where its card chooses them.

    Raises:
        ValueError: files of several kinds, of which `datasets` would read one.
    """
    card = folder / "README.md"
    if card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        return []
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        kind = next((_KINDS[suffix] for suffix in map(str.lower, file.suffixes[::-1]) if suffix in _KINDS), None)
        if kind and not hidden and file.name not in _ABOUT and file.is_file():
            found.setdefault(kind, []).append(file)
    if len(found) > 1:
        examples = ", ".join(f"{kind} ({files[0].relative_to(folder)})" for kind, files in found.items())
        raise ValueError(f"{folder}: holds data files of several kinds: {examples}; keep files of one kind")
    return [file for files in found.values() for file in files]


def warn_left_out(data: Sequence[Path], read: Sequence[Path], folder: Path) -> None:
    """One line for the files of `data` that are in no split."""
    known = {file.resolve() for file in read}
    names = [str(file.relative_to(folder)) for file in data if file.resolve() not in known]
    if names:
        logger.warning(
            "%s: not read, since their names put them in no split: %s; name them as the others, such as train-1.jsonl",
            folder, ", ".join(names),
        )  # fmt: skip
