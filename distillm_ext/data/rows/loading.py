"""Reading rows of text: JSONL, JSON, Parquet, a folder of such files, a saved data set or a hub name, as one
`datasets.Dataset`. `checks` says what a row may hold."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

from distillm_ext.data.rows.checks import KNOWN_COLUMNS, TOKEN_COLUMNS, RowError, check_row
from distillm_ext.data.rows.files import FILE_SUFFIXES, read_files, renamed
from distillm_ext.data.rows.folders import data_files, warn_left_out
from distillm_ext.data.rows.origin import remembers_source
from distillm_ext.paths import expand_path

__all__ = ["FILE_SUFFIXES", "KNOWN_COLUMNS", "TOKEN_COLUMNS", "RowError", "check_row", "load_rows"]


@remembers_source
def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    need_responses: bool = False,
) -> Dataset:
    """Load rows of text from a file, a folder or the hub.

    Args:
        source: an existing `.jsonl`, `.json` (an array of objects, or one object a line) or `.parquet` file; a folder
            of such files, or one written by `Dataset.save_to_disk` or readable by `datasets.load_dataset`; otherwise a
            hub name.
        split: split name, slices allowed: "train", "train[:90%]". A file holds one split, "train".
        subset: configuration name of a hub data set.
        columns: our column name -> the name in the source, for example {"prompt": "instruction"}.
        need_responses: refuse rows of a prompt alone here, by file and line, where the rows are in JSON files;
            `prepare_dataset` refuses those of other sources, by row.

    `~` and environment variables in `source` are replaced.

    Returns:
        A `datasets.Dataset`. From JSON and Parquet only the columns that mean something here are kept (one warning
        names the others), and those with lists or mappings are `datasets.Json` columns: JSON text inside, so that
        `prepare_dataset` gives chat templates the very values of the file, no key more; `rows[0]["messages"]` shows
        them parsed. Data sets that Arrow stored already (saved ones, the hub's) come as they are.

    Raises:
        FileNotFoundError: `source` looks like a file and does not exist.
        ValueError: unknown suffix, a split that is not there, or a bad row (message: file, line and remedy).

    Example:
        >>> rows = load_rows("train.jsonl", split="train[:100]")  # doctest: +SKIP
    """
    source = expand_path(source, "source")
    path, names = Path(source), columns or {}
    _check_targets(names)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in FILE_SUFFIXES:
            raise ValueError(f"{path}: cannot read {suffix or 'a file without suffix'}; use one of {FILE_SUFFIXES}")
        rows = read_files([path], names, str(path), need_responses=need_responses)
        return _take_split({"train": rows}, split, path)
    if path.is_dir():
        return _from_folder(path, split, subset, names, need_responses)
    if suffix in FILE_SUFFIXES or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: no such file; give an existing {', '.join(FILE_SUFFIXES)} or a hub name")
    return renamed(load_dataset(str(source), subset, split=split), names, str(source))


def _from_folder(
    path: Path, split: str, subset: str | None, columns: Mapping[str, str], need_responses: bool
) -> Dataset:
    if (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        assert isinstance(saved, Dataset)
        return renamed(_take_split({"train": saved}, split, path), columns, str(path))
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(str(path))
        assert isinstance(splits, DatasetDict)
        taken = _take_split({str(name): rows for name, rows in splits.items()}, split, path)
        return renamed(taken, columns, str(path))
    data = data_files(path)
    found = load_dataset_builder(str(path), subset).config.data_files or {}
    files = {str(name): [Path(file) for file in listed] for name, listed in found.items()}
    if not files or any(file.suffix.lower() not in FILE_SUFFIXES for listed in files.values() for file in listed):
        return renamed(load_dataset(str(path), subset, split=split), columns, str(path))
    warn_left_out(data, [file for listed in files.values() for file in listed], path)
    wanted = _split_names(split, list(files), path)
    read = {name: read_files(files[name], columns, str(path), need_responses=need_responses) for name in wanted}
    return _take_split(read, split, path)


def _check_targets(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in KNOWN_COLUMNS:
            near = difflib.get_close_matches(name, KNOWN_COLUMNS, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(KNOWN_COLUMNS)}"
            raise ValueError(f"columns: {name!r} is no column that rows are made of; {advice}")


def _split_names(split: str, available: list[str], path: Path) -> list[str]:
    """The splits that a specification such as "train[:10]+test" takes rows of."""
    names = available if split == "all" else [part.split("[")[0] for part in split.split("+")]
    for name in names:
        if name not in available:
            raise ValueError(f"{path}: no split {name!r}; it has {sorted(available)}")
    return names


def _take_split(splits: Mapping[str, Dataset], split: str, path: Path) -> Dataset:
    """Apply a split specification such as "train[10%:]+test" to the splits that there are."""
    names = _split_names(split, list(splits), path)
    if split in splits:
        return splits[split]
    spec = "+".join(names) if split == "all" else split
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute({name: len(splits[name]) for name in names})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path}: cannot take split {split!r} of the splits {sorted(splits)}") from error
    taken = []
    for part in parts:
        rows = splits[part.splitname]
        end = len(rows) if part.to is None else min(part.to, len(rows))
        # `select` refuses an empty range behind the last row.
        taken.append(rows.select(range(part.from_ or 0, end) or range(0)))
    if not any(len(part) for part in taken):
        counts = ", ".join(f"{name!r} has {len(splits[name])} rows" for name in dict.fromkeys(names))
        raise ValueError(f"{path}: split {split!r} takes no row: {counts}")
    return taken[0] if len(taken) == 1 else concatenate_datasets(taken)
