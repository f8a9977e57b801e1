"""YAML values to the types of a dataclass's fields."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any


class CoercionError(ValueError):
    """A value that is not of the field's type; the message says what was expected and what came."""


def field_types(cls: type) -> dict[str, Any]:
    """Type annotation by name of every field that the dataclass's constructor takes."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}


def coerce(value: Any, raw: str | None, annotation: Any) -> Any:
    """Turn a parsed YAML value into one that `annotation` admits.

    Numbers may be written as strings ("1e-4") and integers as whole floats (1e3). A field that takes text gets the
    text as it was written: YAML reads `no` as False and 1e3 as a number where a name was meant.

    Args:
        value: as parsed.
        raw: as written, None for a list or a mapping.
        annotation: the field's type.

    Raises:
        CoercionError: the value does not fit.

    Example:
        >>> coerce("1e-4", "1e-4", float)
        0.0001
    """
    members = _members(annotation)
    if value is None and type(None) in members:
        return None
    if isinstance(value, bool) and bool in members:
        return value
    if isinstance(value, (dict, list)):
        wanted = type(value)
        if any(member is wanted or typing.get_origin(member) is wanted for member in members):
            return value
        raise CoercionError(_expectation(members, value))
    for member in (int, float):
        if member in members:
            number = _number(value, member)
            if number is not None:
                return number
    if raw is not None and value is not None and any(_takes_text(member) for member in members):
        return raw
    if raw and value is not None and any(typing.get_origin(member) is list for member in members):
        return [raw]
    raise CoercionError(_expectation(members, value))


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _takes_text(member: Any) -> bool:
    return member is str or (isinstance(member, type) and issubclass(member, enum.Enum))


def _number(value: Any, wanted: type) -> Any:
    """`value` as a number of the wanted type, or None."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if wanted is float:
        return value if isinstance(value, float) else number
    if isinstance(value, int):
        return value
    return int(number) if number.is_integer() else None


def _expectation(members: list[Any], value: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    expected = []
    for member in members:
        origin = typing.get_origin(member) or member
        if origin in (dict, list):
            text = "a mapping" if origin is dict else "a list"
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            text = "one of " + ", ".join(str(item.value) for item in member)
        else:
            text = names.get(member, str(member))
        if text not in expected:
            expected.append(text)
    return f"expected {' or '.join(expected)}, got {value!r}"
