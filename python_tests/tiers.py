"""Which cases `make test` takes, and which only `make test-all`; see also the mark `pairwise` in conftest.py."""

from __future__ import annotations

from typing import Any

import pytest


def full(*values: Any) -> list[Any]:
    """Values of a parameter of which `make test` takes none, `make test-all` each."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def full_after(count: int, values: list[Any]) -> list[Any]:
    """All values, those behind the first `count` for `make test-all` alone."""
    return [*values[:count], *full(*values[count:])]
