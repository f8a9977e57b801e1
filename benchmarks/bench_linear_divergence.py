"""`linear_distillation_loss` with gradients against its bare matrix products and against materialised logits.

    python benchmarks/bench_linear_divergence.py                    # 512 rows, H 576, V 49,152 and 152,064,
float32, CPU
    python benchmarks/bench_linear_divergence.py --device cuda --dtype bfloat16 --rows 8192 --hidden 4096

Bare products: the logits of both sides, and the gradients of student hidden states and weight from a matrix of the
logits' shape; no loss, no softmax. Every call makes fresh gradients. Medians of calls in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import harness
import torch
from torch import Tensor

from distillm_ext import DIVERGENCES, TeacherHead, distillation_loss, linear_distillation_loss


def bare_products(hidden: Tensor, weight: Tensor, teacher: TeacherHead) -> Callable[[], object]:
    hidden, weight = hidden.detach(), weight.detach()

    def products() -> tuple[Tensor, ...]:
        student_logits, teacher_logits = hidden @ weight.t(), teacher.hidden @ teacher.weight.t()
        return student_logits @ weight, student_logits.t() @ hidden, teacher_logits

    return products


def candidates(
    hidden: Tensor, weight: Tensor, teacher: TeacherHead, options: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    def fused() -> Tensor:
        return linear_distillation_loss(
            hidden, weight, teacher, divergence=options.divergence, chunk_rows=options.chunk_rows
        )

    def materialised() -> Tensor:
        student_logits, teacher_logits = hidden @ weight.t(), teacher.hidden @ teacher.weight.t()
        return distillation_loss(student_logits, teacher_logits, divergence=options.divergence)

    return {
        "ours": lambda: torch.autograd.grad(fused(), (hidden, weight)),
        "bare": bare_products(hidden, weight, teacher),
        "materialised": lambda: torch.autograd.grad(materialised(), (hidden, weight)),
    }


def measure(vocab: int, options: argparse.Namespace) -> harness.Row:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=options.device).mul_(0.05).to(harness.DTYPES[options.dtype])

    hidden, weight = random(options.rows, options.hidden), random(vocab, options.hidden)
    teacher = TeacherHead(random(options.rows, options.teacher_hidden), random(vocab, options.teacher_hidden))
    tried = candidates(hidden.requires_grad_(), weight.requires_grad_(), teacher, options)
    seconds = harness.medians(tried, options.rounds, options.device)

    gradients = (hidden.numel() + weight.numel()) * hidden.element_size()
    peaks = {
        name: (harness.peak_bytes(tried[name], options.device) - gradients) / 2**20 for name in ("ours", "materialised")
    }
    return {
        "V": vocab,
        "H": options.hidden,
        "rows": options.rows,
        "dtype": options.dtype,
        **{f"{name} ms": value * 1e3 for name, value in seconds.items()},
        "ours / bare": seconds["ours"] / seconds["bare"],
        "materialised / ours": seconds["materialised"] / seconds["ours"],
        **{f"{name} extra MiB": value for name, value in peaks.items()},
        "gradients MiB": gradients / 2**20,
        "logits MiB": options.rows * vocab * hidden.element_size() / 2**20,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--teacher-hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 152064])
    parser.add_argument(
        "--divergence", choices=[name for name in DIVERGENCES if name != "interpolated"], default="skew_kl"
    )
    parser.add_argument("--chunk-rows", type=int, default=None, help="default: from the operator's memory budget")
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="float32")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    harness.begin(options)
    rows = [measure(vocab, options) for vocab in options.vocab]
    title = f"linear_distillation_loss, {options.divergence}, value and gradients, {options.device}"
    harness.publish(title, rows, f"linear_divergence_{options.device}_{options.dtype}.csv")


if __name__ == "__main__":
    main(sys.argv[1:])
