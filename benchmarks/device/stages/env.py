"""What this machine is: card, driver, clocks as found, versions, tools, libraries. Changes nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import Any

from distillm_ext.files import write_text

from ..runner import ROOT
from ..stage import Check, NoDevice

_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,compute_mode,mig.mode.current"
_PACKAGES = (
    "numpy", "scipy", "triton", "transformers", "accelerate", "pytest", "pytest-xdist", "pytest-timeout", "pybind11",
    "ninja", "setuptools", "datasets", "trl", "liger-kernel",
)  # fmt: skip


def output(*command: str) -> str | None:
    """What a command prints, or why it does not."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()[-4000:]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda of torch": torch.version.cuda}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory GiB": round(card.total_memory / 2**30, 1),
            "L2 MiB": round(getattr(card, "L2_cache_size", 0) / 2**20, 1),
        }
    return facts


def run(check: Check) -> None:
    libraries = sorted((ROOT / "distillm_ext").glob("_*.so"))
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "nvidia-smi": output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"),
        "nvcc": output("nvcc", "--version"),
        "compute-sanitizer": shutil.which("compute-sanitizer"),
        "ncu": shutil.which("ncu"),
        "git": output("git", "describe", "--always", "--dirty", "--abbrev=40"),
        "libraries": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in libraries},
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    write_text(check.out / "env.json", json.dumps(facts, indent=1))  # torch may not even load
    facts |= _card()
    text = json.dumps(facts, indent=1)
    write_text(check.out / "env.json", text)
    print(text, flush=True)
    if check.cuda and "gpu" not in facts:
        raise NoDevice("torch.cuda.is_available() is False; env.json has what nvidia-smi says")
