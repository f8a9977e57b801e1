"""`distillation_loss` with gradient from compressed teachers, against the dense eager formula and our dense kernel.

    python benchmarks/bench_sparse_divergence.py                    # 256 x 50257, K = 64, float32 and bfloat16, CPU
    python benchmarks/bench_sparse_divergence.py --device cuda --rows 8192 --vocab 128256 --dtypes bfloat16
    python benchmarks/bench_sparse_divergence.py --skip-cuda-model  # without ptxsim

Every call makes a fresh gradient and frees it within the time. Ratios come from one run, candidate by candidate in
turns, medians. The CUDA table is counted by ptxsim and modelled for an H100, not timed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import baselines
import harness
import ml_dtypes
import numpy as np
import torch
from bench_divergence import with_gradient

from distillm_ext import compress_logits, distillation_loss
from distillm_ext.checks.compressed import SPARSE_DIVERGENCES

VOCABULARIES = (32000, 50257, 128256, 151936)


def measure(divergence: str, dtype: str, k: int, options: argparse.Namespace) -> harness.Row:
    shape = (options.rows, options.vocab)
    student, teacher = (torch.randn(shape, device=options.device).to(harness.DTYPES[dtype]) for _ in range(2))
    student.requires_grad_()
    compressed = compress_logits(teacher, k)
    tried = {
        "ours": with_gradient(student, lambda x: distillation_loss(x, compressed, divergence=divergence)),
        "dense": with_gradient(student, lambda x: distillation_loss(x, teacher, divergence=divergence)),
        "eager": with_gradient(student, lambda x: baselines.loss(divergence, x, teacher)),
        "copy": lambda: student.detach().clone(),
    }
    seconds = harness.medians(tried, options.rounds, options.device)
    peaks = {name: harness.peak_bytes(tried[name], options.device) / 2**20 for name in ("ours", "eager")}
    traffic = 2 * student.numel() * student.element_size()
    return {
        "divergence": divergence,
        "dtype": dtype,
        "K": k,
        **{f"{name} ms": seconds[name] * 1e3 for name in ("ours", "dense", "eager")},
        "eager / ours": seconds["eager"] / seconds["ours"],
        "dense / ours": seconds["dense"] / seconds["ours"],
        "ours / copy": seconds["ours"] / seconds["copy"],
        "GB/s": traffic / seconds["ours"] / 1e9,
        **{f"{name} MiB": peak for name, peak in peaks.items()},
        "gradient MiB": student.numel() * student.element_size() / 2**20,
    }


def cuda_counters(vocab: int, dtype: str, k: int = 64, arch: str = "sm_90", gpu: str = "H100-SXM") -> harness.Row:
    """Value and gradient of skew_kl of two rows, once, under ptxsim."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))
    import ptx_sparse
    from ptx_divergence import MODELLED_ROWS, modelled
    from sparse_cases import compressed

    rows, rng = 2, np.random.default_rng(0)
    storage = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    student = (rng.standard_normal((rows, vocab)) * 3).astype(storage)
    teacher = compressed(torch.tensor(rng.standard_normal((rows, vocab)) * 3, dtype=torch.float32), k)
    case = ptx_sparse.SparseCase(student, teacher)
    chunks = case.chunks
    case.staged_chunks, threads = ptx_sparse.launch_shape(case, arch)
    counters = ptx_sparse.launch_sparse(case, arch, threads, check_races=False, count=True).counters
    entries = rows * vocab
    dram_ms, modelled_ms, limiter = modelled(counters, rows, gpu)
    return {
        "dtype": dtype,
        "V": vocab,
        "K": k,
        "staged": case.staged_chunks / chunks,
        "B read": counters.load_bytes / entries,
        "B written": counters.store_bytes / entries,
        "efficiency": counters.load_efficiency,
        "mufu": counters.group("mufu_") / entries,
        "issued": 32 * counters.issued_warp_instructions / entries,
        f"dram ms of {MODELLED_ROWS} rows": dram_ms,
        "model ms": modelled_ms,
        "limit": limiter,
        "model / dram": modelled_ms / dram_ms,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=7)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", choices=list(harness.DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--divergences", nargs="+", choices=SPARSE_DIVERGENCES, default=list(SPARSE_DIVERGENCES))
    parser.add_argument("--skip-cuda-model", action="store_true", help="leave out ptxsim's counters")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    harness.begin(options)
    rows = [
        measure(name, dtype, k, options) for dtype in options.dtypes for k in options.k for name in options.divergences
    ]
    title = f"{options.rows} x {options.vocab}, value and gradient from K teacher entries, {options.device}"
    harness.publish(title, rows, f"sparse_divergence_{options.device}.csv")
    if not options.skip_cuda_model:
        counted = [cuda_counters(vocab, "bfloat16") for vocab in VOCABULARIES]
        harness.publish(
            "sparse skew_kl, sm_90: counts per entry; model on H100 (no timing)", counted,
            "sparse_divergence_cuda_counters.csv",
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
