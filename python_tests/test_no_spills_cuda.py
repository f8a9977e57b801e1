"""What ptxas says about the CUDA kernels on real architectures."""

from __future__ import annotations

import pytest
from ptx_kernels import FUNCTORS, ptxas_report


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_spills(arch):
    """All kernels fit the 168 registers that 384 threads on a multiprocessor leave, without spilling."""
    kernels = ptxas_report(arch)
    assert len(kernels) == 4 * len(FUNCTORS) + 3 + 2  # divergences; scale_rows; pack_logits, unpack_logits
    assert [k for k in kernels if k.spill_bytes or k.stack_bytes or k.registers > 168] == []
