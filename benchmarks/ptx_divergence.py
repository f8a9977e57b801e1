"""Cost of the CUDA kernel of `divergence` without a GPU: counted by ptxsim, modelled for an H100, resources from ptxas.

Nothing here is a timing. bench_divergence.py prints the same tables; alone:

    python benchmarks/ptx_divergence.py
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))

import ptxsim  # noqa: E402
from ptx_kernels import (  # noqa: E402
    FUNCTORS,
    DivergenceCase,
    launch_planned,
    occupancy,
    plan_launch,
)
from ptx_resources import ptxas_report  # noqa: E402

__all__ = ["CounterRow", "cuda_counters", "ptxas_report", "publish_all"]

VOCABULARIES = (32000, 50257, 128256, 151936)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
MODELLED_ROWS = 4096
# Standard deviations of the logits; on flat rows adaptive_kl counts more entries, and more of them alike.
SPREAD = 3.0
SPREADS = {"adaptive_kl": (SPREAD, 1.0, 0.1)}
# Beside the H100: one block per row where there are no clusters, smaller shared memory, more bandwidth per instruction.
OTHER_GPUS = {"sm_80": "A100-80GB", "sm_86": "RTX-3090", "sm_89": "L40S", "sm_100": "B200", "sm_120": "RTX-5090"}


@dataclass
class CounterRow:
    """One case; "per entry" is per row and vocabulary entry."""

    divergence: str
    dtype: str
    spread: float
    vocabulary: int
    arch: str
    cluster: int  # blocks per row
    threads: int  # per block
    occupancy: float  # share of a multiprocessor's threads that are resident
    staged_share: float  # of the row's logits that stay in shared memory
    kept_share: float  # of its entries whose G and q do
    read_bytes: float  # logits from global memory, per entry
    written_bytes: float
    load_efficiency: float  # bytes asked for / bytes of the 32-byte sectors touched
    special_functions: float  # per entry
    fp32_operations: float
    issued_instructions: float
    dram_ms: float  # lower bound for 4096 rows: every byte moved once
    modelled_ms: float  # the largest of all lower bounds, every multiprocessor in use
    limiter: str

    def as_row(self) -> harness.Row:
        return {
            "divergence": self.divergence,
            "dtype": self.dtype,
            "spread": self.spread,
            "V": self.vocabulary,
            "blocks": self.cluster,
            "threads": self.threads,
            "occupancy": self.occupancy,
            "staged": self.staged_share,
            "kept": self.kept_share,
            "B read": self.read_bytes,
            "B written": self.written_bytes,
            "efficiency": self.load_efficiency,
            "mufu": self.special_functions,
            "fp32": self.fp32_operations,
            "issued": self.issued_instructions,
            "dram ms": self.dram_ms,
            "model ms": self.modelled_ms,
            "limit": self.limiter,
            "model / dram": self.modelled_ms / self.dram_ms,
        }


def modelled(counters: ptxsim.Counters, rows: int, gpu: str) -> tuple[float, float, str]:
    """(DRAM bound, largest bound, its name) in ms for MODELLED_ROWS rows spread over the whole GPU."""
    roofline = counters.roofline(gpu)
    spread = roofline.sms_used / ptxsim.GPUS[gpu].sms
    bounds = {name: s * (1 if name == "dram" else spread) for name, s in roofline.bounds.items()}
    limiter = max(bounds, key=lambda name: bounds[name])
    scale = 1e3 * MODELLED_ROWS / rows
    return bounds["dram"] * scale, bounds[limiter] * scale, limiter


def count_case(divergence: str, dtype: str, vocabulary: int, arch: str, gpu: str, spread: float = SPREAD) -> CounterRow:
    rows = 2
    rng = np.random.default_rng(0)
    student, teacher = ((rng.standard_normal((rows, vocabulary)) * spread).astype(DTYPES[dtype]) for _ in range(2))
    case = DivergenceCase(student, teacher, divergence)
    plan = plan_launch(case, arch)
    counters = launch_planned(case, arch, check_races=False).counters
    entries = rows * vocabulary
    read = sum(logits.load_bytes for logits in counters.buffers[:2])
    written = counters.buffers[2].store_bytes
    dram_ms, modelled_ms, limiter = modelled(counters, rows, gpu)
    return CounterRow(
        divergence, dtype, spread, vocabulary, arch, plan.cluster, plan.threads, occupancy(case, plan, arch),
        min(plan.cluster * plan.threads * plan.staged_turns / case.chunks, 1),
        min(plan.cluster * plan.threads * plan.kept_turns / case.chunks, 1),
        read / entries, written / entries, counters.load_efficiency,
        counters.group("mufu_") / entries, counters.group("fp32_") / entries,
        32 * counters.issued_warp_instructions / entries, dram_ms, modelled_ms, limiter,
    )  # fmt: skip


def cuda_counters(
    divergences: tuple[str, ...] = tuple(FUNCTORS),
    dtypes: tuple[str, ...] = ("bfloat16",),
    vocabularies: tuple[int, ...] = VOCABULARIES,
    arch: str = "sm_90",
    gpu: str = "H100-SXM",
) -> list[CounterRow]:
    """Runs value and gradient of every case once under ptxsim."""
    return [
        count_case(divergence, dtype, vocabulary, arch, gpu, spread)
        for divergence in divergences
        for dtype in dtypes
        for spread in SPREADS.get(divergence, (SPREAD,))
        for vocabulary in vocabularies
    ]


def architecture_row(arch: str, gpu: str, vocabulary: int) -> harness.Row:
    """skew_kl on another GPU: logits and gradient without help from the L2 cache, against each byte once."""
    row = count_case("skew_kl", "bfloat16", vocabulary, arch, gpu)
    traffic = (row.read_bytes + row.written_bytes) * MODELLED_ROWS * vocabulary
    traffic_ms = 1e3 * traffic / ptxsim.GPUS[gpu].dram_bytes_per_second
    return {
        "arch": arch,
        "gpu": gpu,
        "V": vocabulary,
        "blocks": row.cluster,
        "threads": row.threads,
        "occupancy": row.occupancy,
        "staged": row.staged_share,
        "B read": row.read_bytes,
        "B written": row.written_bytes,
        "issued": row.issued_instructions,
        "bytes / minimum": traffic_ms / row.dram_ms,
        "model / dram": max(traffic_ms, row.modelled_ms) / row.dram_ms,
    }


def publish_all() -> None:
    """Prints the tables and writes them to results/."""
    title = (
        f"divergence, sm_90, value and gradient: counts per entry; model of {MODELLED_ROWS} rows on H100 (no timing)"
    )
    harness.publish(title, [row.as_row() for row in cuda_counters()], "divergence_cuda_counters.csv")
    rows = [architecture_row(arch, gpu, v) for arch, gpu in OTHER_GPUS.items() for v in VOCABULARIES]
    harness.publish("skew_kl on other GPUs", rows, "divergence_cuda_architectures.csv")
    resources = [
        {"arch": arch, **asdict(kernel)}
        for arch in ARCHITECTURES
        for kernel in sorted(ptxas_report(arch), key=lambda kernel: kernel.kernel)
    ]
    harness.publish("CUDA kernels: registers and spills (ptxas -v)", resources, "cuda_resources.csv")


if __name__ == "__main__":
    publish_all()
