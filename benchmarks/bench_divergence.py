"""`distillation_loss` with gradient against the eager formula and torch.compile; cost of the CUDA kernels.

    python benchmarks/bench_divergence.py                     # 256 x 50257, float32 and bfloat16, CPU
    python benchmarks/bench_divergence.py --device cuda --rows 8192 --vocab 128256 --dtypes bfloat16
    python benchmarks/bench_divergence.py --skip-cuda-model   # without ptxsim and ptxas

Every call makes a fresh gradient. Ratios come from one run, candidate by candidate in turns, medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import baselines
import harness
import torch

from distillm_ext import DIVERGENCES, distillation_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def with_gradient(student: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        student.grad = None
        loss(student).backward()

    return step


def candidates(divergence: str, student: torch.Tensor, teacher: torch.Tensor) -> dict[str, Callable[[], object]]:
    def formula(logits: torch.Tensor) -> torch.Tensor:
        return baselines.loss(divergence, logits, teacher)

    def ours(logits: torch.Tensor) -> torch.Tensor:
        return distillation_loss(logits, teacher, divergence=divergence, **baselines.OPTIONS.get(divergence, {}))

    compiled = torch.compile(formula)
    return {
        "ours": with_gradient(student, ours),
        "eager": with_gradient(student, formula),
        "compile": with_gradient(student, compiled),
        "add": lambda: torch.add(student.detach(), teacher),
    }


def measure(divergence: str, dtype: str, options: argparse.Namespace) -> harness.Row:
    torch.compiler.reset()
    shape = (options.rows, options.vocab)
    student, teacher = (torch.randn(shape, device=options.device).to(DTYPES[dtype]) for _ in range(2))
    tried = candidates(divergence, student.requires_grad_(), teacher)
    seconds = harness.medians(tried, options.rounds, options.device)

    def free_gradient() -> None:
        student.grad = None

    names = ("ours", "eager", "compile")
    peaks = {name: harness.peak_bytes(tried[name], free_gradient, options.device) / 2**20 for name in names}
    traffic = 3 * student.numel() * student.element_size()
    return {
        "divergence": divergence,
        "dtype": dtype,
        **{f"{name} ms": seconds[name] * 1e3 for name in names},
        "eager / ours": seconds["eager"] / seconds["ours"],
        "compile / ours": seconds["compile"] / seconds["ours"],
        "ours / add": seconds["ours"] / seconds["add"],
        "GB/s": traffic / seconds["ours"] / 1e9,
        **{f"{name} MiB": peaks[name] for name in names},
        "gradient MiB": student.numel() * student.element_size() / 2**20,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, help="all that the device has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-cuda-model", action="store_true", help="leave out ptxsim's counters and ptxas")
    options = parser.parse_args(arguments)
    on_device = [name for name in DIVERGENCES if options.device == "cpu" or name not in baselines.CPU_ONLY]
    options.divergences = options.divergences or on_device
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    print(harness.environment())
    rows = [measure(name, dtype, options) for dtype in options.dtypes for name in options.divergences]
    title = f"{options.rows} x {options.vocab}, value and gradient, {options.device}"
    harness.publish(title, rows, f"divergence_{options.device}.csv")
    if not options.skip_cuda_model:
        import ptx_divergence

        ptx_divergence.publish_all()


if __name__ == "__main__":
    main(sys.argv[1:])
