"""Which cases `make test` takes, and which only `make test-all`; see also the mark `pairwise` in conftest.py."""

from __future__ import annotations

from typing import Any

import pytest


def full(*values: Any) -> list[Any]:
    """Values of a parameter of which `make test` takes none, `make test-all` each."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
