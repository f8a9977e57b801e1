"""The compiled libraries: those that lie in distillm_ext/ where they load and fit, else built in place.

Prebuilt ones load by their plain names (`_C.so`, `_C_cuda.so`, `_codec.so`) under any Python; only `_codec` has to be
of the same Python version, and is compiled alone where it is not. What this stage has built it builds again when the
sources change; libraries that somebody else put there are taken as they are, and their hashes are in env.json.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from typing import Any

from distillm_ext.files import write_text

from ..runner import ROOT
from ..stage import Check, NoDevice

PACKAGE = ROOT / "distillm_ext"
STAMP = ROOT / "build" / "device_libs.json"
_LOAD = """
import json, torch
from distillm_ext import build_info
capability = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else ""
try:
    import distillm_ext._codec
    codec = ""
except ImportError as error:
    codec = str(error)
print("FACTS", json.dumps({**build_info(), "capability": capability, "codec": codec}))
"""


def _loaded() -> dict[str, Any]:
    """What the libraries say of themselves, in a process of its own: one that has failed to load is not tried again."""
    done = subprocess.run([sys.executable, "-c", _LOAD], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    return json.loads(lines[-1][6:]) if lines else {"error": done.stderr.strip()[-1000:]}


def fits(compiled: str, card: str) -> bool:
    """Whether code for one architecture ("9.0", "9.0a", "12.0+PTX") runs on a card: PTX on any later one, machine code
    within a generation."""
    major, minor = map(int, compiled.removesuffix("+PTX").rstrip("af").split("."))
    wanted = tuple(map(int, card.split(".")))
    if compiled.endswith("+PTX"):
        return (major, minor) <= wanted
    return major == wanted[0] and minor <= wanted[1]


def problem_of(facts: dict[str, Any], cuda: bool) -> str:
    """Why the operators cannot be used as they are, or nothing."""
    if "error" in facts:
        return str(facts["error"])
    if not cuda:
        return ""
    if not facts["cuda_loaded"]:
        return str(facts["cuda_reason"])
    compiled, wanted = facts["cuda_archs"].split(), facts["capability"]
    if any(fits(arch, wanted) for arch in compiled):
        return ""
    return f"the CUDA kernels are compiled for {', '.join(compiled)}, not for this card ({wanted})"


def _sources() -> str:
    paths = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def _hashes() -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(PACKAGE.glob("_*.so"))}


def _stale() -> bool:
    """Whether the libraries are those that this stage built, of other sources."""
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    return stamp.get("libraries") == _hashes() and stamp.get("sources") != _sources()


def _run(command: list[str], **environment: str) -> None:
    print(shlex.join(command), environment, flush=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)


def _build(cuda: bool, capability: str) -> None:
    environment = {"MAX_JOBS": str(os.cpu_count() or 1), "DISTILLM_CUDA": "1" if cuda else "0"}
    if cuda:
        environment |= {"TORCH_CUDA_ARCH_LIST": capability, "DISTILLM_LINEINFO": "1"}
    _run([sys.executable, "setup.py", "build_ext", "--inplace"], **environment)
    STAMP.parent.mkdir(parents=True, exist_ok=True)
    write_text(STAMP, json.dumps({"sources": _sources(), "libraries": _hashes()}))


def _build_codec() -> None:
    """By one line of the compiler: the operators may be prebuilt for any Python, this module cannot."""
    if importlib.util.find_spec("pybind11") is None:
        print("_codec cannot be built: pybind11 is not installed", flush=True)
        return
    import pybind11

    target = PACKAGE / f"_codec{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    _run([*compiler, *flags, *includes, str(ROOT / "csrc" / "codec.cpp"), "-o", str(target)])


def _capability() -> str:
    """Of the card, before any of our libraries is there to ask; Hopper where there is none."""
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "9.0"


def run(check: Check) -> None:
    facts = _loaded()
    problem = problem_of(facts, check.cuda) or ("built of other sources" if _stale() else "")
    if problem:
        print(f"building: {problem}", flush=True)
        _build(check.cuda, _capability())
        facts = _loaded()
        problem = problem_of(facts, check.cuda)
    if not problem and facts["codec"]:
        print(f"building _codec: {facts['codec']}", flush=True)
        _build_codec()
        facts = _loaded()
    print(json.dumps(facts, indent=1), flush=True)
    if problem:
        raise NoDevice(problem)
    names = " ".join(path.name for path in sorted(PACKAGE.glob("_*.so")))
    check.record("libraries", files=names, cuda_archs=facts["cuda_archs"], torch_built=facts["torch_built"])
    check.record("codec", ok=not facts["codec"], **({"error": facts["codec"]} if facts["codec"] else {}))
