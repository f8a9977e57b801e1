"""YAML settings as a tree whose every leaf knows the line, or the override, it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml


class SettingsError(ValueError):
    """Settings that cannot be used; the message says which key, where it stands, and what is legal."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string and does not notice a key given twice; this loader reads a number and does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Given:
    """A value as given: parsed, its raw text if it is one scalar, and where it stands."""

    value: Any
    raw: str | None
    place: str


Tree = dict[str, "Given | Tree"]


def parse_tree(text: str, source: str) -> Tree:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise SettingsError(f"{source}: expected a mapping of settings at the top level")
        return _tree(loader, node, source)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def _tree(loader: _Loader, node: yaml.MappingNode, source: str) -> Tree:
    loader.construct_mapping(node)  # merge keys, duplicate keys
    return {str(key.value): _given(loader, value, f"{source}, line {key.start_mark.line + 1}")
            for key, value in node.value}  # fmt: skip


def _given(loader: _Loader, node: Any, place: str) -> Given | Tree:
    if isinstance(node, yaml.MappingNode):
        return _tree(loader, node, place.rsplit(", line", 1)[0])
    raw = node.value if isinstance(node, yaml.ScalarNode) else None
    return Given(loader.construct_object(node, deep=True), raw, place)


def apply_override(tree: Tree, override: str) -> None:
    """Put one "dotted.key=value" into the tree."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise SettingsError(f"override {override!r}: expected KEY=VALUE with a dotted key, as training.max_steps=100")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        place = f"override {override!r}"
        value = Given(None, "", place) if node is None else _given(loader, node, place)
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: the value is not valid YAML: {error}") from error
    finally:
        loader.dispose()
    branch = tree
    for name in names[:-1]:
        below = branch.get(name)
        if not isinstance(below, dict):
            # `student.keep_layers=4` replaces `student: some/model`.
            below = branch[name] = {}
        branch = below
    branch[names[-1]] = value


def place_of(value: Given | Tree) -> str:
    """Where a value stands; a mapping stands where its first value does."""
    if isinstance(value, Given):
        return value.place
    return next((place for place in map(place_of, value.values()) if place), "")


def collect_places(tree: Tree, prefix: str, places: dict[str, str]) -> None:
    for key, value in tree.items():
        places[prefix + key] = place_of(value)
        if isinstance(value, dict):
            collect_places(value, f"{prefix}{key}.", places)


def plain(value: Given | Tree) -> Any:
    """The value without its place."""
    return value.value if isinstance(value, Given) else {key: plain(below) for key, below in value.items()}
