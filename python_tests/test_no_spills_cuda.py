"""What ptxas says about the CUDA kernels: registers, spills, shared memory. As it was built, and for every
other architecture in `make test-all`."""

from __future__ import annotations

from collections import Counter

import pytest
from ptx_kernels import FUNCTORS
from ptx_resources import KernelResources, built_library, built_report, ptxas_report
from tiers import full

# Of each kernel: how many instances there are, and the registers that a thread may have so that as many threads as the
# launcher counts on share the 65536 of a multiprocessor (they come in eights).
KERNELS = {
    "divergence_kernel": (4 * len(FUNCTORS), 65536 // 384 // 8 * 8),
    "scale_rows_kernel": (3, 168),
    "pack_logits_kernel": (1, 168),
    "unpack_logits_kernel": (1, 168),
    "sparse_divergence_kernel": (3, 65536 // 1024),
    "logprob_divergence_kernel": (16, 65536 // 1024),
    "topk_logits_kernel": (9, 65536 // 1024),
    "draw_logits_kernel": (9, 65536 // 512),
    "sample_tokens_kernel": (3, 65536 // 640 // 8 * 8),
}
SOURCES = ("all.cu", "sparse_divergence.cu", "logprob_divergence.cu", "all_topk_logits.cu", "sample_tokens.cu")


def check(kernels: list[KernelResources]) -> None:
    assert Counter(kernel.name for kernel in kernels) == {name: count for name, (count, _) in KERNELS.items()}
    assert [k for k in kernels if k.spill_bytes or k.stack_bytes or k.registers > KERNELS[k.name][1]] == []
    assert all(kernel.static_shared_bytes <= 48 * 1024 for kernel in kernels)


@pytest.mark.skipif(built_library() is None, reason="the extension was built without CUDA kernels")
def test_no_spills_as_built():
    report = built_report()
    assert report, "the library holds no machine code"
    for kernels in report.values():
        check(kernels)


@pytest.mark.parametrize("arch", full("sm_80", "sm_90", "sm_100", "sm_120"))
def test_no_spills(arch):
    check([kernel for source in SOURCES for kernel in ptxas_report(arch, source)])
