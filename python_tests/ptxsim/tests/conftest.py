from pathlib import Path

import numpy as np
import ptxsim
import pytest
from ptxsim.tests.support import compiled


@pytest.fixture
def edited_ptx(tmp_path):
    """Simulator for the PTX of a file after an edit of its text."""

    def make(file: str, edit, arch: str = "sm_90") -> ptxsim.Simulator:
        text = Path(compiled(file, arch).path).read_text()
        changed = edit(text)
        assert changed != text
        path = tmp_path / "edited.ptx"
        path.write_text(changed)
        return ptxsim.load_ptx(path)

    return make


@pytest.fixture
def rng():
    return np.random.default_rng(1)
