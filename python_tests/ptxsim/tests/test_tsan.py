"""The ThreadSanitizer mode, in a process of its own (libtsan must be loaded first)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import numpy as np
import ptxsim
from pathlib import Path
from ptxsim.tests import support, test_negative

text = Path(support.compiled("basic.cu").path).read_text()
if sys.argv[1] != "good":
    text = test_negative.delete_in_softmax(r"bar\\.sync\\s+0;", int(sys.argv[1]))(text)
sim = ptxsim.Simulator(text)
for seed in (0, 1, 2):
    test_negative.launch_softmax(
        sim, np.random.default_rng(0), seed=seed, check_races=False, count=False
    )
print("finished")
"""


def libtsan():
    result = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True)
    path = result.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.mark.skipif(libtsan() is None, reason="needs libtsan")
@pytest.mark.parametrize("case", ("good", "0", "1"))
def test_thread_sanitizer(case):
    environment = {
        **os.environ,
        "PTXSIM_TSAN": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "LD_PRELOAD": libtsan(),
        "TSAN_OPTIONS": "exitcode=0 report_signal_unsafe=0",
    }
    # setarch -R: this TSan does not cope with much address-space randomisation
    result = subprocess.run(
        ["setarch", "-R", sys.executable, "-c", SCRIPT, case],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer cannot start here")
    assert "finished" in result.stdout, result.stderr
    assert ("data race" in result.stderr) == (case != "good"), result.stderr
