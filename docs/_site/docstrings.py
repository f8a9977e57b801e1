"""Docstrings as Markdown: a griffe extension for what the docstrings hold of reStructuredText.

- ``:math:`x` `` and ``.. math::`` become what `maths.py` turns into MathML;
- simple tables (rows of ``=``) become Markdown tables;
- "Example:" is griffe's section "Examples:", and "a, b: text" under "Args:" is one parameter each;
- "A, B: text" under "Raises:" is "A | B: text";
- a public name in backticks becomes a link to its place in these pages;
- public names of a package are members of it, also those that it loads on first use.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from griffe import Alias, Extension, GriffeLoader, Module, Object

# Packages whose public names these pages hold.
PACKAGES = (
    "distillm_ext", "distillm_ext.generation", "distillm_ext.teacher", "distillm_ext.training",
    "distillm_ext.evaluation",
)  # fmt: skip
_LISTS = ("Args:", "Attributes:", "Raises:")
_NAMES = re.compile(r"(?P<names>[\w.]+(?:,\s+[\w.]+)+):\s+(?P<text>.*)", re.DOTALL)


class Docstrings(Extension):
    """Rewrites every docstring before it is parsed, and resolves lazy names."""

    def __init__(self) -> None:
        self.homes = {name: package for package in PACKAGES for name in importlib.import_module(package).__all__}

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = mathematics(obj.docstring.value)
            obj.docstring.value = linked(sections(tables(text)), self.homes, obj.name)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Members of the packages are the objects themselves: a function may have the name of its module."""
        found = []
        for name, package in self.homes.items():
            value = getattr(importlib.import_module(package), name)
            if hasattr(value, "__qualname__"):
                target = loader.modules_collection[value.__module__][value.__qualname__]
                found.append((package, Alias(name, target)))
        for package, alias in found:
            home = loader.modules_collection[package]
            alias.parent = home
            home.set_member(alias.name, alias)


def mathematics(text: str) -> str:
    r"""``:math:`x` `` as ``\(x\)``, and ``.. math:: x`` with what is indented below it as a block ``\[x\]``."""

    def block(found: re.Match[str]) -> str:
        indent = found["indent"]
        return f"{indent}\\[\n{indent}{' '.join(found['formula'].split())}\n{indent}\\]\n"

    text = re.sub(
        r"^(?P<indent> *)\.\. math:: *(?P<formula>.*\n(?:(?P=indent) +\S.*\n?)*)", block, text, flags=re.MULTILINE
    )
    return re.sub(r":math:`([^`]+)`", lambda found: rf"\({' '.join(found[1].split())}\)", text)


def tables(text: str) -> str:
    """Simple tables as Markdown tables; lines whose first column is empty go on with the row above."""
    lines: list[str] = []
    rule = re.compile(r"^ *=+(?: +=+)+$")
    waiting = text.splitlines()
    while waiting:
        line = waiting.pop(0)
        if not rule.match(line):
            lines.append(line)
            continue
        columns = [(found.start(), found.end()) for found in re.finditer(r"=+", line)]
        parts = [_rows_until_rule(waiting, rule, columns)]
        if waiting and waiting[0].strip():  # a second part: the first was the head
            parts.append(_rows_until_rule(waiting, rule, columns))
        head = parts[0][0] if len(parts) == 2 else [""] * len(columns)
        rows = [head, ["---"] * len(columns), *parts[-1]]
        lines.extend(" " * columns[0][0] + f"| {' | '.join(row)} |" for row in rows)
    return "\n".join(lines)


def _rows_until_rule(waiting: list[str], rule: re.Pattern[str], columns: list[tuple[int, int]]) -> list[list[str]]:
    rows: list[list[str]] = []
    while not rule.match(line := waiting.pop(0)):
        ends = [end for _, end in columns[:-1]] + [len(line)]
        cells = [line[begin:end].strip() for (begin, _), end in zip(columns, ends, strict=True)]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    return [[_without_pipes(cell) for cell in row] for row in rows]


def _without_pipes(cell: str) -> str:
    """Bars of a formula by their names: a Markdown table takes them for the end of the cell."""
    return re.sub(r"\\?\|", lambda bar: r"\Vert " if bar[0] == r"\|" else r"\vert ", cell)


def sections(text: str) -> str:
    """Sections by griffe's names, a line for each parameter."""
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    lines: list[str] = []
    waiting = text.splitlines()
    while waiting:
        line = waiting.pop(0)
        lines.append(line)
        if (title := line.strip()) in _LISTS:
            indent = len(line) - len(line.lstrip())
            while waiting and (not waiting[0].strip() or len(waiting[0]) - len(waiting[0].lstrip()) > indent):
                lines.extend(_separate(_item(waiting), " | " if title == "Raises:" else None))
    return "\n".join(lines)


def _item(waiting: list[str]) -> list[str]:
    """The next line with those that are indented below it."""
    item = [waiting.pop(0)]
    indent = len(item[0]) - len(item[0].lstrip())
    while waiting and item[0].strip() and waiting[0].strip() and len(waiting[0]) - len(waiting[0].lstrip()) > indent:
        item.append(waiting.pop(0))
    return item


def _separate(item: list[str], joint: str | None) -> list[str]:
    """An item of several names as an item for each, or as one with a joint between them."""
    indent = item[0][: len(item[0]) - len(item[0].lstrip())]
    found = _NAMES.fullmatch("\n".join(item).strip())
    if not found:
        return item
    names = re.split(r",\s+", found["names"])
    names = names if joint is None else [joint.join(names)]
    return [line for name in names for line in f"{indent}{name}: {found['text']}".splitlines()]


def linked(text: str, homes: dict[str, str], own: str) -> str:
    """Public names in single backticks as links, apart from the object's own and from lines of an example."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        return f"[`{name}`][{homes[name]}.{name}]" if name in homes and name != own else found[0]

    lines = [
        line if line.lstrip().startswith((">>>", "...")) else re.sub(r"(?<!`)`(\w+)`(?!`)", link, line)
        for line in text.splitlines()
    ]
    return "\n".join(lines)
