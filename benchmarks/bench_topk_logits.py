"""`compress_logits` against torch.topk + torch.logsumexp on the CPU; counted cost of the CUDA kernels.

    python benchmarks/bench_topk_logits.py                    # 256 x 50257 and 256 x 152064, float32 and bfloat16
    python benchmarks/bench_topk_logits.py --device cuda --rows 8192
    python benchmarks/bench_topk_logits.py --skip-cuda-model  # without ptxsim and ptxas

The baseline gives less: no tail mass, no total order on ties. Ratios come from one run, candidates in turns, medians.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import harness
import torch

from distillm_ext import compress_logits

harness.DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


def measure(vocab: int, dtype: str, k: int, options: argparse.Namespace) -> harness.Row:
    logits = (torch.randn(options.rows, vocab, device=options.device) * 3).to(harness.DTYPES[dtype])
    position = torch.arange(options.rows, device=options.device)
    seconds = harness.medians(
        {
            "ours": lambda: compress_logits(logits, k),
            "two": lambda: compress_logits(logits, k, temperatures=(1.0, 2.0)),
            "sample": lambda: compress_logits(logits, k, method="sample", position=position),
            "topk": lambda: torch.topk(logits, k),
            "logsumexp": lambda: torch.logsumexp(logits, -1),
        },
        options.rounds,
        options.device,
    )
    return {
        "dtype": dtype,
        "V": vocab,
        "k": k,
        "ours ms": seconds["ours"] * 1e3,
        "at T = 1, 2 ms": seconds["two"] * 1e3,
        "sample ms": seconds["sample"] * 1e3,
        "topk ms": seconds["topk"] * 1e3,
        "logsumexp ms": seconds["logsumexp"] * 1e3,
        "(topk + logsumexp) / ours": (seconds["topk"] + seconds["logsumexp"]) / seconds["ours"],
        "GB/s": logits.numel() * logits.element_size() / seconds["ours"] / 1e9,
    }


def cuda_counters(vocabularies: tuple[int, ...], k: int = 64, gpu: str = "H100-SXM") -> list[harness.Row]:
    """Runs one row of each case under ptxsim: counts per entry, and a model of 4096 rows. Nothing here is a timing."""
    import ml_dtypes
    import numpy as np
    from ptx_divergence import modelled
    from ptx_topk_logits import TopkCase, launch_topk

    rows = []
    for method in ("topk", "sample"):
        for vocab in vocabularies:
            logits = (np.random.default_rng(0).standard_normal((1, vocab)) * 3).astype(ml_dtypes.bfloat16)
            case = TopkCase(logits, k, position=np.arange(1) if method == "sample" else None)
            counters = launch_topk(case, check_races=False).counters
            dram_ms, modelled_ms, limiter = modelled(counters, 1, gpu)
            rows.append({
                "method": method, "dtype": "bfloat16", "V": vocab, "k": k,
                "B read": counters.buffers[0].load_bytes / vocab,
                "efficiency": counters.load_efficiency,
                "mufu": counters.group("mufu_") / vocab, "fp32": counters.group("fp32_") / vocab,
                "issued": 32 * counters.issued_warp_instructions / vocab,
                "dram ms": dram_ms, "model ms": modelled_ms, "limit": limiter, "model / dram": modelled_ms / dram_ms,
            })  # fmt: skip
    return rows


def publish_cuda_model() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))
    from ptx_resources import ptxas_report

    title = "topk_logits, sm_90: counts per entry; model of 4096 rows on H100 (no timing)"
    harness.publish(title, cuda_counters((32000, 50257, 128256, 151936)), "topk_logits_cuda_counters.csv")
    resources = [
        {"arch": arch, **vars(kernel)} for arch in ARCHITECTURES for kernel in ptxas_report(arch, "all_topk_logits.cu")
    ]
    harness.publish("topk_logits: registers and spills (ptxas -v)", resources, "topk_logits_cuda_resources.csv")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257, 152064])
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", choices=list(harness.DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--skip-cuda-model", action="store_true", help="leave out ptxsim's counters and ptxas")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    harness.begin(options)
    cases = [(vocab, dtype, k) for dtype in options.dtypes for vocab in options.vocab for k in options.k]
    rows = [measure(*case, options) for case in cases]
    harness.publish(f"{options.rows} rows, {options.device}", rows, f"topk_logits_{options.device}.csv")
    if not options.skip_cuda_model:
        publish_cuda_model()


if __name__ == "__main__":
    main(sys.argv[1:])
