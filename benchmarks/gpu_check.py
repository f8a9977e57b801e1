"""`make gpu-check`: every correctness test and benchmark of the CUDA kernels on a real device, one report.

Writes benchmarks/results/gpu_check.md. Exits with 2 where there is no GPU or no CUDA kernels, with 1 where a test
fails.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import harness
import torch

from distillm_ext import build_info

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "tests": ["-m", "pytest", "-m", "gpu", "python_tests/gpu", "-q"],
    "8192 x 128256": ["benchmarks/bench_divergence.py", "--device", "cuda", "--rows", "8192", "--vocab", "128256",
                      "--dtypes", "bfloat16", "--skip-cuda-model"],
    "8192 x 50257": ["benchmarks/bench_divergence.py", "--device", "cuda", "--rows", "8192", "--vocab", "50257",
                     "--dtypes", "bfloat16", "float32", "--skip-cuda-model"],
    "fused linear": ["benchmarks/bench_linear_divergence.py", "--device", "cuda", "--dtype", "bfloat16"],
    "topk_logits": ["benchmarks/bench_topk_logits.py", "--device", "cuda", "--skip-cuda-model"],
    "sparse_divergence": ["benchmarks/bench_sparse_divergence.py", "--device", "cuda", "--skip-cuda-model"],
    "sample_tokens": ["benchmarks/bench_sample_tokens.py", "--device", "cuda", "--skip-cuda-model"],
}  # fmt: skip


def missing() -> str | None:
    info = build_info()
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False on this machine"
    return None if info["cuda_loaded"] else f"no CUDA kernels: {info['cuda_reason']}"


def main() -> int:
    reason = missing()
    if reason:
        print(f"gpu-check: {reason}.", file=sys.stderr)
        return 2
    sections, failed = [f"# GPU check\n\n{torch.cuda.get_device_name(0)}, {harness.environment()}\n"], False
    for name, command in STEPS.items():
        start = time.monotonic()
        result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        failed |= result.returncode != 0
        print(result.stdout + result.stderr)
        seconds = time.monotonic() - start
        sections.append(f"## {name} ({seconds:.0f} s, exit {result.returncode})\n\n```\n{result.stdout[-8000:]}\n```\n")
    target = harness.RESULTS / "gpu_check.md"
    target.write_text("\n".join(sections))
    print(f"gpu-check: {'FAILED' if failed else 'passed'}, report in {target.relative_to(ROOT)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
