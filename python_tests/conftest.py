"""What `make test` leaves to `make test-all`, how tests are divided among processes, how to run a failing one alone."""

from __future__ import annotations

import gc
import re
from collections import defaultdict
from itertools import combinations

import pytest


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts processes of which a test needs several, or which it kills."""
    from forked import Forks

    found = Forks(tmp_path_factory.mktemp("forks"))
    yield found
    found.close()


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    grids: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        file, _, test = item.nodeid.partition("::")
        # The tests of a file share what their process has made; simulated kernels share it through the cache on disk.
        simulated = file.endswith("_cuda.py") or "/ptxsim/" in file
        function = f"{file}::{test.partition('[')[0]}"
        item.add_marker(pytest.mark.xdist_group(function if simulated else file))
        if item.get_closest_marker("pairwise") and not item.get_closest_marker("slow"):
            grids[function].append(item)
    for grid in grids.values():
        for item in beyond_pairs(grid):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    # Every run of a trainer collects garbage. What the imports have made is none: to look through it takes 0.3 s.
    gc.freeze()


def beyond_pairs(grid: list[pytest.Function]) -> list[pytest.Function]:
    """The items of one parametrised test without which every two values of different parameters still meet."""

    def pairs(item: pytest.Function) -> set[tuple]:
        return set(combinations(sorted(item.callspec.indices.items()), 2))

    left = {item: pairs(item) for item in grid}
    assert all(left.values()), "the mark `pairwise` is for tests of two parameters and more"
    missing = set().union(*left.values())
    while missing:
        best = max(left, key=lambda item: len(left[item] & missing))  # the first of equals: the same in every process
        missing -= left.pop(best)
    return list(left)


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]
    alone = dict.fromkeys(re.sub(r"@python_tests/\S+$", "", report.nodeid) for report in reports)  # without its group
    if alone:
        terminalreporter.section("to run a failing test alone")
    for test in alone:
        terminalreporter.write_line(f"python -m pytest '{test}'")
