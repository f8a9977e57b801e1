"""Shared by the tests: one simulator per (file, architecture), kept for the whole run."""

from functools import cache
from pathlib import Path

import numpy as np
import ptxsim
from tiers import full

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("sm_90", *full("sm_80", "sm_100", "sm_120"))
CLUSTER_ARCHITECTURES = ("sm_90", *full("sm_100", "sm_120"))


@cache
def compiled(file: str, arch: str = "sm_90", **defines) -> ptxsim.Simulator:
    return ptxsim.compile_cuda(HERE / "kernels" / file, arch, defines=defines)


def softmax_reference(x):
    x = x.astype(np.float64)
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
