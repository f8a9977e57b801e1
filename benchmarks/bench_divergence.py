"""`distillation_loss` with gradient against the eager formula, torch.compile, TRL and Liger; cost of the CUDA kernels.

    python benchmarks/bench_divergence.py                     # 256 x 50257, float32 and bfloat16, CPU
    python benchmarks/bench_divergence.py --device cuda --rows 8192 --vocab 128256 --dtypes bfloat16
    python benchmarks/bench_divergence.py --skip-cuda-model   # without ptxsim and ptxas

Every call makes a fresh gradient and frees it within the time. Liger's kernels need a GPU: their column is empty on the
CPU. GB/s count both inputs and the gradient once; "copy GB/s" is a copy between two warm tensors of that size. Ratios
come from one run, candidate by candidate in turns, medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import baselines
import harness
import peers
import roofline
import speed_chart
import torch

from distillm_ext import DIVERGENCES, distillation_loss


def with_gradient(
    student: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: torch.autograd.grad(loss(student), student)


def candidates(divergence: str, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, Callable[[], object]]:
    def formula(logits: torch.Tensor) -> torch.Tensor:
        return baselines.loss(divergence, logits, teacher)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return distillation_loss(logits, teacher, divergence=divergence, **baselines.OPTIONS.get(divergence, {}))

    losses = {
        "ours": ours,
        "eager": formula,
        "compile": torch.compile(formula),
        "trl": peers.trl(divergence, teacher),
        "liger": peers.liger(divergence, teacher),
    }
    target = torch.empty_like(teacher)
    return {
        **{name: with_gradient(student, loss) for name, loss in losses.items() if loss is not None},
        "add": lambda: torch.add(student.detach(), teacher),
        "copy": lambda: target.copy_(teacher),
    }


def measure(divergence: str, dtype: str, options: argparse.Namespace) -> harness.Row:
    torch.compiler.reset()
    shape = (options.rows, options.vocab)
    student, teacher = (torch.randn(shape, device=options.device).to(harness.DTYPES[dtype]) for _ in range(2))
    tried = candidates(divergence, student.requires_grad_(), teacher)
    seconds = harness.medians(tried, options.rounds, options.device)

    names = [name for name in ("ours", "eager", "compile", "trl", "liger") if name in tried]
    peaks = {name: harness.peak_bytes(tried[name], options.device) / 2**20 for name in names}
    size = student.numel() * student.element_size()
    columns = ("ours", "eager", "compile", "trl", "liger")
    return {
        "divergence": divergence,
        "dtype": dtype,
        **{f"{name} ms": seconds[name] * 1e3 if name in names else "" for name in columns},
        **{f"{name} / ours": seconds[name] / seconds["ours"] if name in names else "" for name in columns[1:]},
        "ours / add": seconds["ours"] / seconds["add"],
        "GB/s": 3 * size / seconds["ours"] / 1e9,
        "copy GB/s": 2 * size / seconds["copy"] / 1e9,
        **{f"{name} MiB": peaks[name] if name in names else "" for name in columns},
        "gradient MiB": size / 2**20,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=7)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtypes", nargs="+", choices=list(harness.DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES))
    parser.add_argument("--skip-cuda-model", action="store_true", help="leave out ptxsim's counters and ptxas")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    harness.begin(options)
    rows = [measure(name, dtype, options) for dtype in options.dtypes for name in options.divergences]
    title = f"{options.rows} x {options.vocab}, value and gradient, {options.device}"
    harness.publish(title, rows, f"divergence_{options.device}.csv")
    if not options.skip_cuda_model:
        import ptx_divergence

        ptx_divergence.publish_all()
    roofline.publish(options.device)
    speed_chart.publish(options.device)


if __name__ == "__main__":
    main(sys.argv[1:])
