"""The house keeps its order: what `make lint` does not hold of it (who may import whom: pyproject.toml)."""

import ast
import re
from pathlib import Path

import pytest
from divergence_cases import ALWAYS_FINITE, INFINITE_WITHOUT

import distillm_ext
from distillm_ext.checks.options import DIVERGENCES

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


ROOT = Path(__file__).parents[1]
GUIDES = ("docs/architecture.md", "docs/extending.md")
# Members that are made of a row as a whole stand in a file of their own.
ROW_MEMBERS = {"csrc/math/divergence.h": "csrc/math/row_divergence.h"}


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / GUIDES[1]).read_text("utf-8"), re.M | re.S)[1]


TABLE = re.findall(r"^\| `([^`]+)` \|", section("A divergence"), re.M)


@pytest.mark.parametrize("path", TABLE)
def test_every_divergence_is_in_the_files_that_the_guide_names(path):
    text = (ROOT / path).read_text("utf-8")
    if path in ROW_MEMBERS:
        text += (ROOT / ROW_MEMBERS[path]).read_text("utf-8")
    assert [name for name in DIVERGENCES if not re.search(rf"\b{name}\b", text)] == []


def test_the_guide_names_what_a_divergence_needs():
    assert len(TABLE) == 9 and sorted((*ALWAYS_FINITE, *INFINITE_WITHOUT)) == sorted(DIVERGENCES)


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_name_files_that_are_there(guide):
    text = (ROOT / guide).read_text("utf-8")
    paths = set(re.findall(r"`((?:csrc|distillm_ext|python_tests|benchmarks|docs)/[\w./]*)`", text))
    named = {
        path for path in paths if "/x." not in path and "/x_" not in path and "_x." not in path and "/x/" not in path
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_walks_name_functions_that_are_there():
    """`room/module.name` of the walks: the module is there, and has the name."""
    steps = re.findall(r"(?<![\w/])((?:cli|runs|training|models|data|generation|teacher|ops)/[a-z_/]+)\.(\w+)", walks())
    assert len(steps) > 20
    texts = {module: PACKAGE / f"{module}.py" for module, _ in steps}
    assert [module for module, path in texts.items() if not path.is_file()] == []
    assert [f"{m}.{n}" for m, n in steps if n != "py" and not re.search(rf"\b{n}\b", texts[m].read_text("utf-8"))] == []


def walks():
    return (ROOT / GUIDES[0]).read_text("utf-8").partition("## Walk 1")[2].partition("## Glossary")[0]
