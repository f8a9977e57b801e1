"""Nested values between Python and Arrow tables.

A column of an Arrow table has one type: a struct gets every key that any row has, null where a row lacks it, and a key
with two types cannot be stored at all. Chat templates print what they are given, so nested columns travel as JSON text
(`datasets.Json`), and what is read from the tables of others loses the keys that are null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from distillm_ext.data.rows.checks import MESSAGE_COLUMNS, TEMPLATE_COLUMNS, RowError

# Rows per piece: an Arrow array of strings ends at 2 GiB.
_PIECE = 1 << 13


def is_json(kind: pa.DataType) -> bool:
    """Whether an Arrow type is JSON text."""
    return isinstance(kind, pa.JsonType)


def is_nested(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are lists, structs, maps or JSON."""
    return pa.types.is_nested(kind) or is_json(kind)


def json_column(values: Sequence[Any]) -> pa.ChunkedArray:
    """A column of JSON text; None stays null.

    Raises:
        TypeError: a value that JSON has no form for.
    """
    pieces = []
    for start in range(0, max(len(values), 1), _PIECE):
        part = values[start : start + _PIECE]
        texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in part]
        pieces.append(pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string())))
    return pa.chunked_array(pieces, pa.json_())


def column_values(column: pa.ChunkedArray, name: str) -> list[Any]:
    """The Python values of a column.

    Struct keys that are null are left out, since Arrow gives every row the keys of all; of a message, `content` stays.
    Maps and JSON text keep their nulls.

    Args:
        column: any Arrow type.
        name: our name of the column, which says whether it holds messages.
    """
    values = column.to_pylist(maps_as_pydicts="strict")
    if not is_nested(column.type):
        return values
    keep = ("content",) if name in MESSAGE_COLUMNS else ()
    return [_plain(value, column.type, keep) for value in values]


def table_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, by `column_values`."""
    columns = {name: column_values(table.column(name), name) for name in table.column_names}
    return [{name: values[index] for name, values in columns.items()} for index in range(table.num_rows)]


def check_leaves(row: Mapping[str, Any]) -> None:
    """Raise `RowError` where a column for the chat template holds what JSON has no form for, such as a date.

    A template would print it as Python does.
    """
    for name in (*MESSAGE_COLUMNS, *TEMPLATE_COLUMNS):
        if isinstance(row.get(name), (list, dict)):
            _check_leaves(row[name], name)


def _check_leaves(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_leaves(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_leaves(item, f"{place}[{index}]")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise RowError(f"{place} is {type(value).__name__}, which JSON has no form for; store it as text or a number")


def _plain(value: Any, kind: pa.DataType, keep: Sequence[str]) -> Any:
    if value is None or not is_nested(kind):
        return value
    if is_json(kind):
        return json.loads(value)
    if pa.types.is_map(kind):
        return {key: _plain(item, kind.item_type, ()) for key, item in value.items()}
    if pa.types.is_struct(kind):
        return _plain_struct(value, kind, keep)
    return [_plain(item, kind.value_type, keep) for item in value]


def _plain_struct(value: Mapping[str, Any], kind: pa.StructType, keep: Sequence[str]) -> dict[str, Any]:
    fields = (kind.field(index) for index in range(kind.num_fields))
    return {
        field.name: _plain(value[field.name], field.type, ())
        for field in fields
        if value[field.name] is not None or field.name in keep
    }
