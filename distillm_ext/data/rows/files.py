"""Rows out of JSON, JSONL and Parquet files, one or several that make a data set together.

Files are read here and not by `datasets`, whose readers fit all rows to one Arrow type: they would add keys to nested
values, refuse keys of several types, and name neither file nor line of a row that does not fit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from distillm_ext.data.rows.arrow_values import column_values, is_nested, json_column
from distillm_ext.data.rows.checks import (
    KNOWN_COLUMNS,
    TOKEN_COLUMNS,
    RowError,
    check_response,
    check_row,
    parsed_row,
    type_name,
)

logger = logging.getLogger(__name__)
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_LINE_SUFFIXES = (".jsonl", ".ndjson")
_TOKEN_TYPES = {
    "input_ids": pa.list_(pa.int64()), "loss_mask": pa.list_(pa.int64()), "prompt_length": pa.int64(),
}  # fmt: skip


def read_files(
    files: Sequence[Path], columns: Mapping[str, str], source: str, *, need_responses: bool = False
) -> Dataset:
    """The rows of files of one kind, with the columns that mean something here.

    Args:
        files: JSON files, or Parquet files.
        columns: our column name -> the name in the files.
        source: what to call the data set where a message is about all of it.
        need_responses: refuse rows of a prompt alone in JSON files, where they have a line.

    Returns:
        Lists and mappings as JSON columns (`datasets.Json`), token rows as lists of integers, text as text.

    Raises:
        ValueError: a file that cannot be read, or a bad row; the message names file, line (or row) and column.
    """
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if parquet and len(parquet) < len(files):
        raise ValueError(f"{source}: holds Parquet and JSON files for one split; keep files of one kind")
    return _from_parquet(parquet, columns, source) if parquet else _from_json(files, columns, source, need_responses)


def warn_unused(names: Iterable[str], source: str) -> None:
    """One line for the columns of a data set that nothing is made of."""
    listed = ", ".join(repr(name) for name in sorted(names))
    if listed:
        logger.warning("%s: not used: the columns %s", source, listed)


def renamed(dataset: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    """`dataset` with our names for its columns.

    Raises:
        ValueError: `columns` names one that is not there, or one twice.
    """
    for target, name in columns.items():
        if target != name and name not in dataset.column_names:
            raise ValueError(f"{source}: columns maps {target!r} to {name!r}; columns there: {dataset.column_names}")
    names = {name: target for target, name in columns.items()}
    if len(names) < len(columns):
        raise ValueError(f"{source}: columns maps several names to one column: {dict(columns)}; map each to its own")
    # All at once: names may change places.
    taken = [target for target in columns if target in dataset.column_names and target not in names]
    there = {name: target for name, target in names.items() if name in dataset.column_names}
    return dataset.remove_columns(taken).rename_columns(there)


# ---- JSON


def _from_json(files: Sequence[Path], columns: Mapping[str, str], source: str, need_responses: bool) -> Dataset:
    rows: list[dict[str, Any]] = []
    shapes: dict[str, tuple[type, Path, str]] = {}
    unused: set[str] = set()
    for file in files:
        for place, row in _json_rows(file):
            kept = _json_row(row, columns, f"{file}, {place}", unused, need_responses)
            _check_shapes(kept, shapes, file, place)
            rows.append(kept)
    if not rows:
        raise ValueError(f"{source}: the file holds no row")
    warn_unused(unused, source)
    return Dataset.from_dict({name: _column(name, kind, rows) for name, (kind, *_) in shapes.items()})


def _json_row(
    row: Any, columns: Mapping[str, str], place: str, unused: set[str], need_responses: bool
) -> dict[str, Any]:
    """The known columns of one row, checked; the names of all others are added to `unused`."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type_name(row)}")
    mapped = {**row, **{target: row.get(name) for target, name in columns.items()}}
    own = [name for name in KNOWN_COLUMNS if name not in columns]
    unused.update(name for name in row if name not in own and name not in columns.values())
    try:
        parsed = parsed_row(mapped)
        kind = check_row(parsed)
        if need_responses:
            check_response(parsed, kind)
    except RowError as error:
        raise ValueError(f"{place}: {error}") from error
    moved = set(columns.values()) - set(columns)
    kept = {name: parsed[name] for name in KNOWN_COLUMNS if parsed.get(name) is not None and name not in moved}
    _check_text(kept, place)
    return kept


def _column(name: str, kind: type, rows: Sequence[Mapping[str, Any]]) -> Any:
    values = [row.get(name) for row in rows]
    return json_column(values) if kind in (list, dict) and name not in TOKEN_COLUMNS else values


def _check_shapes(row: Mapping[str, Any], shapes: dict[str, tuple[type, Path, str]], file: Path, place: str) -> None:
    """A column is text or JSON: a string here and a list there is an error of the file."""
    for name, value in row.items():
        known, first, where = shapes.setdefault(name, (type(value), file, place))
        if type(value) is not known:
            there = where if first == file else f"{first}, {where}"
            raise ValueError(
                f"{file}, {place}: {name} is {type_name(value)} here and {known.__name__} in {there}; use one type"
            )


def _check_text(row: Mapping[str, Any], place: str) -> None:
    """JSON can spell half of a surrogate pair, which is no text and cannot be stored."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        broken = error.object[error.start]
        raise ValueError(f"{place}: holds {broken!a}, which is no character; remove it") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("line 7" or "row 7", parsed value)."""
    with path.open("rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if path.suffix.lower() in _LINE_SUFFIXES or not start.startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: invalid JSON: {error}; correct or remove the entry there") from error
    for index, value in enumerate(values, start=1):
        yield f"row {index}", value


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: invalid JSON: {error}; correct or remove the line") from error


# ---- Parquet


def _from_parquet(files: Sequence[Path], columns: Mapping[str, str], source: str) -> Dataset:
    schemas = {file: _schema(file) for file in files}
    names = dict.fromkeys(name for schema in schemas.values() for name in schema.names)
    ours = {name: target for target, name in columns.items()}
    wanted = [name for name in names if name in ours or (name in KNOWN_COLUMNS and name not in columns)]
    if not wanted:
        raise ValueError(
            f"{source}: has none of the columns {KNOWN_COLUMNS}, but {list(names)}; map them with `columns`"
        )
    warn_unused([name for name in names if name not in wanted], source)
    first = _part(schemas[files[0]], wanted)
    if all(_part(schema, wanted) == first for schema in schemas.values()) and not any(map(_must_convert, first.types)):
        # Plain text stays in the library's cache on disk.
        return renamed(Dataset.from_parquet([str(file) for file in files], columns=wanted), columns, source)
    parts: dict[str, list[pa.ChunkedArray]] = {name: [] for name in wanted}
    for file in files:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=_part(schemas[file], wanted).names):
            for name in wanted:
                place = f"{file}, column {name!r}"
                parts[name].append(_converted(pa.table(batch), name, ours.get(name, name), place))
    joined = {name: _joined(name, found, source) for name, found in parts.items()}
    return renamed(Dataset.from_dict(joined), columns, source)


def _schema(path: Path) -> pa.Schema:
    try:
        return pyarrow.parquet.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _part(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    return pa.schema([pa.field(name, schema.field(name).type) for name in names if name in schema.names])


def _must_convert(kind: pa.DataType) -> bool:
    """Whether `datasets` would change values of this type, or not know it."""
    flat_list = pa.types.is_list(kind) and not is_nested(kind.value_type)
    known = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)
    return not (flat_list or known)


def _converted(table: pa.Table, name: str, target: str, place: str) -> pa.ChunkedArray:
    """A column as it is stored here: JSON where it is nested, plain strings and integers elsewhere."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows)])
    column = table.column(name)
    try:
        if target in _TOKEN_TYPES:
            return pa.chunked_array([pa.array(column.to_pylist(), _TOKEN_TYPES[target])])
        if is_nested(column.type):
            return json_column(column_values(column, target))
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        return column.cast(pa.string() if text else kind)
    except (pa.ArrowException, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{place}: cannot be read: {error}") from error


def _joined(name: str, parts: Sequence[pa.ChunkedArray], source: str) -> pa.ChunkedArray:
    kinds = {part.type for part in parts if not pa.types.is_null(part.type)}
    if len(kinds) > 1:
        raise ValueError(f"{source}: column {name!r} is {' here and '.join(map(str, kinds))} there; use one type")
    kind = kinds.pop() if kinds else pa.null()
    pieces = [pa.nulls(len(part), kind) if pa.types.is_null(part.type) else part for part in parts]
    chunks = [chunk for piece in pieces for chunk in (piece.chunks if isinstance(piece, pa.ChunkedArray) else [piece])]
    return pa.chunked_array(chunks, kind)
