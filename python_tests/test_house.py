"""The house keeps its order: what `make lint` does not hold of it (who may import whom: pyproject.toml)."""

import ast
import re
from pathlib import Path

import baselines
import divergence_oracle
import ptx_kernels
import pytest
from divergence_cases import ALWAYS_FINITE, INFINITE_WITHOUT

import distillm_ext
from distillm_ext import functional, reference
from distillm_ext.checks.options import DIVERGENCES

PACKAGE = Path(distillm_ext.__file__).parent
ROOT = Path(__file__).parents[1]
COMPILED = {"_codec", "_C", "_C_cuda"}
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
MAP, GUIDE = (ROOT / f"docs/{name}.md" for name in ("architecture", "extending"))


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


# ---- modules


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in COMPILED | NAMED_TUPLE


def foreign_privates(path):
    """Private names that a module takes from another one: imported, or read off what it imported."""
    tree, owners = parsed(path), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            owners |= {a.asname or a.name for a in node.names if a.name.startswith("distillm_ext")}
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("distillm_ext")):
            continue
        for alias in node.names:
            if private(alias.name):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} imports {alias.name}"
            owners.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in owners:
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} reads {ast.unparse(node)}"


def test_no_module_takes_a_private_name_of_another():
    """ruff's PLC2701 holds this for imports from outside of the package alone."""
    assert [found for path in sorted(PACKAGE.rglob("*.py")) for found in foreign_privates(path)] == []


def test_a_room_is_seen_at_a_glance():
    """A folder with many modules side by side wants to be two."""
    rooms = {path.parent for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.h")]}
    sizes = {room.relative_to(ROOT).as_posix(): len([*room.glob("[!_]*.*")]) for room in rooms}
    assert {
        room: size for room, size in sizes.items() if size > 13 and room not in ("distillm_ext", "csrc/tests")
    } == {}
    assert sizes["distillm_ext"] <= 16  # public faces and data


def test_headers_point_downwards():
    """csrc: cpu, cuda → ops, math; ops → math; math → math."""
    below = {"math": {"math"}, "ops": {"ops", "math"}, "cpu": {"cpu", "ops", "math"}, "cuda": {"cuda", "ops", "math"}}
    wrong, seen = [], 0
    for room, allowed in below.items():
        for path in (ROOT / "csrc" / room).rglob("*.*"):
            for name in re.findall(r'^#include "([^"]+)"', path.read_text("utf-8"), re.M):
                seen += 1
                target = (path.parent / name).resolve().relative_to(ROOT / "csrc").parts[0]
                wrong += [f"{path.name} includes {name}"] if target not in allowed else []
    assert wrong == [] and seen > 100


# ---- the guide


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", GUIDE.read_text("utf-8"), re.M | re.S)[1]


def strings(path, function):
    """String constants in a function of a module."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef) and node.name == function]
    return {node.value for node in ast.walk(nodes[0]) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def conventions():
    """Words of the tables."""
    rows = re.findall(r"^\|.*$", (ROOT / "docs/conventions.md").read_text("utf-8"), re.M)
    return set(re.findall(r"\w+", " ".join(rows)))


def kernels():
    text = (ROOT / "csrc/math/divergence.h").read_text("utf-8")
    rows = (ROOT / "csrc/math/row_divergence.h").read_text("utf-8")  # members that are made of a row as a whole
    return {*re.findall(r'X\("(\w+)",', text), *re.findall(r"^//   (\w+) \(", rows, re.M)}


# The names that each file of the guide's table has, in the place that the guide names.
TABLES = {
    "csrc/math/divergence.h": kernels,
    "distillm_ext/checks/options.py": lambda: set(DIVERGENCES),
    "distillm_ext/reference/dense.py": lambda: strings(PACKAGE / "reference/dense.py", "per_token_divergence"),
    "distillm_ext/functional.py": lambda: {*re.findall(r"^ {4}(\w+) {2,}", functional.distillation_loss.__doc__, re.M)},
    "benchmarks/baselines.py": lambda: set(baselines.FORMULAS),
    "python_tests/divergence_oracle.py": lambda: strings(Path(divergence_oracle.__file__), "terms"),
    "python_tests/ptx_kernels.py": lambda: set(ptx_kernels.FUNCTORS),
    "python_tests/divergence_cases.py": lambda: {*ALWAYS_FINITE, *INFINITE_WITHOUT},
    "docs/conventions.md": conventions,
}


def test_the_guide_has_a_table_of_what_a_divergence_needs():
    assert re.findall(r"^\| `([^`]+)` \|", section("A divergence"), re.M) == list(TABLES)
    formulas = re.findall(r"^def ([a-z]\w*)", (PACKAGE / "reference/dense.py").read_text("utf-8"), re.M)
    assert set(formulas) <= set(reference.__all__)


@pytest.mark.parametrize("path", TABLES)
def test_every_divergence_is_in_the_tables_that_the_guide_names(path):
    assert set(DIVERGENCES) - TABLES[path]() == set()


@pytest.mark.parametrize("guide", [MAP, GUIDE], ids=lambda path: path.stem)
def test_guides_name_files_that_are_there(guide):
    paths = set(re.findall(r"`((?:csrc|distillm_ext|python_tests|benchmarks|docs)/[\w./]*)`", guide.read_text("utf-8")))
    pattern = re.compile(r"/x[./_]|_x\.|test_x")  # of an operator called x
    assert [path for path in sorted(paths) if not pattern.search(path) and not (ROOT / path).exists()] == []


# ---- the map


def test_the_map_shows_the_layers_that_are_held():
    block = re.search(r"## Rooms.*?```\n(.*?)```", MAP.read_text("utf-8"), re.S)[1]
    shown = [re.split(r" {3,}", line)[0] for line in block.splitlines()]
    held = re.search(r'name = "Rooms".*?layers = \[(.*?)\]', (ROOT / "pyproject.toml").read_text("utf-8"), re.S)[1]
    assert shown == re.findall(r'"([^"]+)"', held)


def test_the_map_names_modules_that_are_there():
    """The table of folders: each file of a row lies in its folder."""
    rows = re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", MAP.read_text("utf-8"), re.M)
    named = [(folder, name) for folder, text in rows for name in re.findall(r"`([\w/]+(?:\.py|/))`", text)]
    missing = [f"{folder}/{name}" for folder, name in named if not (PACKAGE / folder / name).exists()]
    assert len(rows) >= 10 and len(named) > 25 and missing == []


def walks():
    return MAP.read_text("utf-8").partition("## Walk 1")[2].partition("## Glossary")[0]


def defined(module):
    return {n.name for n in ast.walk(parsed(module)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_the_walks_name_what_is_there():
    """`room/module.name` and `room/module.Class.method`: the module has them; paths of csrc are files or folders."""
    rooms = "cli|runs|training|models|data|generation|teacher|ops"
    steps = re.findall(rf"(?<![\w/])((?:{rooms})/[a-z_/]+)((?:\.\w+)*)", walks())
    missing = [module for module, _ in steps if not (PACKAGE / f"{module}.py").is_file()]
    assert missing == [] and len(steps) > 30
    for module, names in steps:
        wanted = {name for name in names.split(".")[1:] if name != "py"}
        assert wanted <= defined(PACKAGE / f"{module}.py"), (module, names)
    sources = re.findall(r"csrc/[\w./]+\w", walks())
    assert len(sources) >= 5 and [path for path in sources if not (ROOT / path).exists()] == []
