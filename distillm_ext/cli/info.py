"""`distillm info`: versions, CPU instruction set, CUDA kernels."""

from __future__ import annotations


def info_lines() -> list[str]:
    """Aligned lines on this installation, for the terminal and for bug reports."""
    from importlib.metadata import PackageNotFoundError, version

    from distillm_ext import build_info

    facts = build_info()
    try:
        transformers = version("transformers")
    except PackageNotFoundError:
        transformers = "not installed (pip install 'distillm_ext[train]')"
    architectures = facts["cuda_archs"]
    if not isinstance(architectures, str):
        architectures = ", ".join(map(str, architectures))
    lines = {
        "distillm_ext": facts["version"],
        "python": facts["python"],
        "torch": f"{facts['torch']} (extension built with {facts['torch_built']})",
        "transformers": transformers,
        "CPU instruction set": facts["cpu_isa"],
        "CUDA architectures": architectures or "none compiled",
        "CUDA kernels": "loaded" if facts["cuda_loaded"] else f"not loaded: {facts['cuda_reason']}",
        "CUDA device": facts["cuda_device"] or "none",
    }
    width = max(map(len, lines)) + 2
    return [f"{name:<{width}}{value}" for name, value in lines.items()]


def info() -> None:
    """Print versions, the CPU instruction set in use and the state of the CUDA kernels."""
    print("\n".join(info_lines()))
