"""Compiles the simulated CUDA kernels that `make test` launches, on all cores: `python python_tests/ptx_modules.py`.

Tests compile what they miss by themselves, but one after another, and show no progress. What is in the cache is not
compiled again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import ptxsim
from ptx_kernels import FUNCTORS, compiled
from tqdm import tqdm

ELEMENTS = ("float", "BFloat16", "Half")


def modules() -> Iterator[tuple[str, str, dict[str, str]]]:
    """File of python_tests/kernels, architecture and defines."""
    for functor in FUNCTORS.values():
        yield "divergence.cu", "sm_90", {"FUNCTOR": functor, "TYPE": "float"}
    for name in ("skew_kl", "adaptive_kl", "interpolated"):
        yield "divergence.cu", "sm_90", {"FUNCTOR": FUNCTORS[name], "TYPE": "BFloat16"}
    for element in ("Half", "AnyElement"):
        yield "divergence.cu", "sm_90", {"FUNCTOR": FUNCTORS["skew_kl"], "TYPE": element}
    for element in ELEMENTS:
        yield "sample_tokens.cu", "sm_90", {"LOGITS": element}
        yield "sparse_divergence.cu", "sm_90", {"STUDENT": element}
        for slots in ("2", "4"):
            yield "topk_logits.cu", "sm_90", {"TYPE": element, "SLOTS": slots}
    for element in ("float", "BFloat16"):
        yield "topk_logits.cu", "sm_90", {"TYPE": element, "SLOTS": "1"}
    for source in ("logprob_divergence.cu", "pack_logits.cu", "scale_rows.cu"):
        yield source, "sm_90", {}
    yield "divergence.cu", "sm_80", {"FUNCTOR": FUNCTORS["skew_kl"], "TYPE": "BFloat16"}
    yield "sample_tokens.cu", "sm_80", {"LOGITS": "BFloat16"}
    yield "sparse_divergence.cu", "sm_80", {"STUDENT": "BFloat16"}
    yield "topk_logits.cu", "sm_80", {"TYPE": "BFloat16", "SLOTS": "1"}
    yield "pack_logits.cu", "sm_80", {}


def build(source: str, arch: str, defines: dict[str, str]) -> str:
    compiled(source, arch, **defines).build()
    return " ".join([source, arch, *defines.values()])


def main() -> None:
    try:
        ptxsim.find_nvcc()
    except ptxsim.BuildError as error:
        print(f"no kernel is simulated: {error}")
        return
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        waiting = [pool.submit(build, *module) for module in modules()]
        with tqdm(total=len(waiting), desc="simulated kernels", unit="module") as progress:
            for done in as_completed(waiting):
                progress.set_postfix_str(done.result())
                progress.update()


if __name__ == "__main__":
    main()
