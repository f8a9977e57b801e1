"""`sample_tokens` against Hugging Face's processors and torch.multinomial; cost of the CUDA kernel, counted by ptxsim.

    python benchmarks/bench_sample_tokens.py                      # 64 x 49152, float32, CPU
    python benchmarks/bench_sample_tokens.py --device cuda --rows 256 --vocab 131072 --skip-cuda-model

Candidates in turns in one run, medians. The baseline of a row without filters is softmax + multinomial.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from distillm_ext import sample_tokens

Rule = dict[str, float | int]
RULES: tuple[Rule, ...] = (
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {},
    {"temperature": 0.8},
    {"top_p": 0.9},
    {"top_k": 1000},
)
CUDA_VOCABULARIES = (32000, 50257, 128256, 151936)


def baseline(logits: torch.Tensor, rule: Rule) -> Callable[[], torch.Tensor]:
    steps = LogitsProcessorList()
    for name, warper in (("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper),
                         ("top_p", TopPLogitsWarper)):  # fmt: skip
        if name in rule:
            steps.append(warper(rule[name]))
    return lambda: torch.multinomial(steps(None, logits).softmax(-1), 1)


def measure(rule: Rule, options: argparse.Namespace) -> harness.Row:
    logits = torch.randn(options.rows, options.vocab, device=options.device) * 3
    seeds = torch.arange(options.rows, device=options.device)
    seconds = harness.medians(
        {
            "ours": lambda: sample_tokens(logits, seed=seeds, position=0, **rule),  # type: ignore[arg-type]
            "baseline": baseline(logits, rule),
        },
        options.rounds,
        options.device,
    )
    return {
        "rule": ", ".join(f"{k} {v}" for k, v in rule.items()) or "none",
        "ours ms": seconds["ours"] * 1e3,
        "baseline ms": seconds["baseline"] * 1e3,
        "baseline / ours": seconds["baseline"] / seconds["ours"],
        "GB/s": logits.numel() * 4 / seconds["ours"] / 1e9,
    }


def cuda_counters(gpu: str = "H100-SXM", arch: str = "sm_90") -> list[harness.Row]:
    """Counts of one row under ptxsim, and the largest lower bound of the model over the bound of reading it once."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))
    import ml_dtypes
    import numpy as np
    import ptxsim
    from ptx_sampling import SamplingCase, launch_sampling, planned

    rows = []
    for rule in RULES:
        for vocab in CUDA_VOCABULARIES:
            logits = (np.random.default_rng(0).standard_normal((1, vocab)) * 3).astype(ml_dtypes.bfloat16)
            case, threads = planned(SamplingCase(logits, **rule), arch)
            counters = launch_sampling(case, arch, threads).counters
            bounds = counters.roofline(gpu).bounds
            once = 2 * vocab / ptxsim.GPUS[gpu].dram_bytes_per_second
            spread = counters.roofline(gpu).sms_used / ptxsim.GPUS[gpu].sms
            busiest = max((s * (1 if n == "dram" else spread), n) for n, s in bounds.items())
            rows.append({
                "rule": ", ".join(f"{k} {v}" for k, v in rule.items()) or "none", "V": vocab,
                "blocks": case.cluster, "staged": min(case.cluster * case.staged_chunks / case.chunks(), 1.0),
                "reads of the row": counters.load_bytes / (2 * vocab),
                "mufu": counters.group("mufu_") / vocab, "fp32": counters.group("fp32_") / vocab,
                "issued": 32 * counters.issued_warp_instructions / vocab, "limit": busiest[1],
                "model / dram": busiest[0] / once,
            })  # fmt: skip
    return rows


def main(arguments: list[str]) -> None:
    parser = harness.parser(__doc__, rounds=7)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--skip-cuda-model", action="store_true", help="leave out ptxsim's counters")
    options = parser.parse_args(arguments)
    harness.begin(options)
    table = [measure(rule, options) for rule in RULES]
    harness.publish(f"sample_tokens, {options.rows} x {options.vocab}", table, f"sample_tokens_{options.device}.csv")
    if not options.skip_cuda_model:
        title = (
            "sample_tokens, bfloat16, sm_90: counts per entry, model of H100 with every multiprocessor busy (no timing)"
        )
        harness.publish(title, cuda_counters(), "sample_tokens_cuda_counters.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
