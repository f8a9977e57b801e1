"""Where a training row came from: its file and line, for messages about a row that only showed itself in training."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from distillm_ext.paths import expand_path

# Data sets that were read from one file, as (file, split).
_SOURCES: weakref.WeakKeyDictionary[Dataset, tuple[Path, str]] = weakref.WeakKeyDictionary()
# Prepared data sets, as (the data set that was handed over, what prepares another one in the same way).
_PREPARED: weakref.WeakKeyDictionary[Dataset, tuple[Dataset, Callable[[Dataset], Dataset]]] = (
    weakref.WeakKeyDictionary()
)
# Dropped rows shift the numbers of those after them. No more candidates than this are tokenised to find a row again.
_MOST_CANDIDATES = 200


def remembers_source(load: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Decorates a function `load(source, *, split="train", …)`: remembers the file that a data set was read from."""

    @functools.wraps(load)
    def remembering(source: Any, *args: Any, **options: Any) -> Dataset:
        dataset = load(source, *args, **options)
        path = Path(expand_path(source, "source"))
        if path.is_file():
            _SOURCES[dataset] = (path, options.get("split", "train"))
        return dataset

    return remembering


def remembers_rows(prepare: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Decorates a function `prepare(dataset, …)`: remembers what a prepared data set was made of."""

    @functools.wraps(prepare)
    def remembering(dataset: Dataset, *args: Any, **options: Any) -> Dataset:
        prepared = prepare(dataset, *args, **options)
        if len(prepared) == len(dataset):
            keep_origin(prepared, dataset)  # of token rows, which may have been prepared before
        if prepared is not dataset and prepared not in _PREPARED:
            _PREPARED[prepared] = (dataset, lambda rows: prepare(rows, *args, **options))
        return prepared

    return remembering


def keep_origin(derived: Dataset, dataset: Dataset) -> Dataset:
    """→ `derived`, whose rows are the first ones of `dataset`, in its order: what is known of those holds for them."""
    if dataset in _SOURCES:
        _SOURCES[derived] = _SOURCES[dataset]
    if dataset in _PREPARED:
        _PREPARED[derived] = _PREPARED[dataset]
    return derived


def origin_of(prepared: Any) -> RowOrigin:
    """The origin of the rows of a data set that `remembers_rows` has seen; of any other nothing is known."""
    known = _PREPARED.get(prepared) if isinstance(prepared, Dataset) else None
    return RowOrigin(None, prepared, lambda rows: rows) if known is None else RowOrigin(known[0], prepared, known[1])


def name_row(row: int, origin: Mapping[str, Any]) -> str:
    """A row in a few words: "row 3 of rows.jsonl, line 4"."""
    if "file" not in origin:
        return f"row {row}"
    place = "".join(f", {key} {origin[key]}" for key in ("line", "row") if key in origin)
    return f"row {row} of {origin['file']}{place}"


class RowOrigin:
    """Finds the origin of rows of a prepared data set.

    Args:
        dataset: as it was handed over, or None.
        prepared: as it is trained on; rows may have been dropped, none were moved.
        prepare: tokenises a data set as `prepared` was; raises ValueError where no row is left.
    """

    def __init__(self, dataset: Dataset | None, prepared: Any, prepare: Callable[[Dataset], Any]) -> None:
        self.dataset = dataset
        self.prepared = prepared
        self.prepare = prepare

    def __call__(self, row: int) -> dict[str, Any]:
        """→ `dataset_row` (0-based, of the data set handed over) and, where known, `file` with `line` or `row`
        (1-based). Whatever cannot be found out is left out."""
        source = self._source_row(row)
        if source is None or self.dataset is None:
            return {}
        found: dict[str, Any] = {"dataset_row": source}
        if self.dataset in _SOURCES:
            path, split = _SOURCES[self.dataset]
            found["file"] = str(path)
            if split == "train":
                found |= place_in_file(path, source)
        return found

    def _source_row(self, row: int) -> int | None:
        if self.dataset is None or not 0 <= row < len(self.prepared):
            return None
        dropped = len(self.dataset) - len(self.prepared)
        if dropped == 0:
            return row
        wanted = self.prepared[row]["input_ids"]
        for candidate in range(row, row + min(dropped, _MOST_CANDIDATES) + 1):
            if self._tokens(candidate) == wanted:
                return candidate
        return None

    def _tokens(self, candidate: int) -> list[int] | None:
        assert self.dataset is not None
        package = logging.getLogger("distillm_ext")
        before = package.level
        package.setLevel(logging.ERROR)  # what was said of the whole set need not be said of its rows
        try:
            return list(self.prepare(self.dataset.select([candidate]))[0]["input_ids"])
        except ValueError:
            return None  # a dropped row
        finally:
            package.setLevel(before)


def place_in_file(path: Path, index: int) -> dict[str, int]:
    """→ {"line": n} in a file of JSON lines, {"row": n} in any other; 1-based. Blank lines hold no row."""
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return {"row": index + 1}
    with path.open("rb") as file:
        if path.suffix.lower() == ".json" and file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return {"row": index + 1}
        file.seek(0)
        filled = (number for number, line in enumerate(file, start=1) if line.removeprefix(b"\xef\xbb\xbf").strip())
        found = next((number for place, number in enumerate(filled) if place == index), None)
    return {"row": index + 1} if found is None else {"line": found}
