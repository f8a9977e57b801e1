"""The house keeps its order: what `make lint` does not hold of it (who may import whom: pyproject.toml)."""

import ast
from pathlib import Path

import distillm_ext

PACKAGE = Path(distillm_ext.__file__).parent
COMPILED = {"_codec", "_C", "_C_cuda"}


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in COMPILED


def foreign_privates(path):
    """Private names that a module takes from another one: imported, or read off an imported module."""
    tree, modules = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("distillm_ext")):
            continue
        for alias in node.names:
            if private(alias.name):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} imports {alias.name}"
            modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and private(node.attr):
            if node.value.id in modules and node.value.id.islower():
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} reads {node.value.id}.{node.attr}"


def test_no_module_takes_a_private_name_of_another():
    """ruff's PLC2701 holds this for imports from outside of the package alone."""
    assert [found for path in sorted(PACKAGE.rglob("*.py")) for found in foreign_privates(path)] == []


def test_a_room_is_seen_at_a_glance():
    """A folder of the package with many modules wants to be two."""
    rooms = {path.parent for path in PACKAGE.rglob("*.py")}
    sizes = {room.relative_to(PACKAGE).as_posix(): len([*room.glob("*.py")]) - 1 for room in rooms}
    assert {room: size for room, size in sizes.items() if room != "." and size > 14} == {}
