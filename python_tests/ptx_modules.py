"""Compiles the simulated CUDA kernels that `make test` launches, on all cores: `python python_tests/ptx_modules.py`.

Tests compile what they miss by themselves, but one after another, and show no progress. What is in the cache is not
compiled again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from ptx_kernels import FUNCTORS, compiled
from tqdm import tqdm

ELEMENTS = ("float", "BFloat16", "Half")


def modules() -> Iterator[tuple[str, str, dict[str, str]]]:
    """File of python_tests/kernels, architecture and defines; those that take longest come first."""
    for functor in reversed(FUNCTORS.values()):
        yield "divergence.cu", "sm_90", {"FUNCTOR": functor, "TYPE": "float"}
    for element in ("BFloat16", "Half", "AnyElement"):
        yield "divergence.cu", "sm_90", {"FUNCTOR": FUNCTORS["skew_kl"], "TYPE": element}
    yield "logprob_divergence.cu", "sm_90", {}
    for element in ELEMENTS:
        yield "sample_tokens.cu", "sm_90", {"LOGITS": element}
        yield "sparse_divergence.cu", "sm_90", {"STUDENT": element}
        yield "topk_logits.cu", "sm_90", {"TYPE": element, "SLOTS": "4"}
    yield "pack_logits.cu", "sm_90", {}
    yield "scale_rows.cu", "sm_90", {}


def build(source: str, arch: str, defines: dict[str, str]) -> str:
    compiled(source, arch, **defines).build()
    return " ".join([source, arch, *defines.values()])


def main() -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        waiting = [pool.submit(build, *module) for module in modules()]
        with tqdm(total=len(waiting), desc="simulated kernels", unit="module") as progress:
            for done in as_completed(waiting):
                progress.set_postfix_str(done.result())
                progress.update()


if __name__ == "__main__":
    main()
