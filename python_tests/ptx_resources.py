"""What ptxas says about the CUDA kernels, of the library as it was built or of a real architecture."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ptxsim
from ptx_kernels import KERNELS, ROOT


@dataclass
class KernelResources:
    """What ptxas says about a kernel."""

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int

    @property
    def name(self) -> str:
        """Without template arguments."""
        return self.kernel.partition("<")[0]


def ptxas_report(arch: str, source: str = "all.cu") -> list[KernelResources]:
    """Compiles the kernels of a file of python_tests/kernels for a real architecture and reads `ptxas -v`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ptxsim.find_nvcc(), "-std=c++17", "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
                   f"-I{ROOT / 'csrc'}", str(KERNELS / source), "-o", f"{folder}/all.cubin"]  # fmt: skip
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    found = re.findall(pattern, text)
    names = ptxsim.demangle([mangled for mangled, *_ in found])
    return [
        KernelResources(_short(name), int(registers), int(stores) + int(loads), int(stack), int(shared or 0))
        for name, (_, stack, stores, loads, registers, shared) in zip(names, found, strict=True)
    ]


def built_library() -> Path | None:
    """The extension's CUDA kernels, if it was built with them."""
    found = importlib.util.find_spec("distillm_ext._C_cuda")
    return Path(found.origin) if found and found.origin else None


def built_report() -> dict[str, list[KernelResources]]:
    """The kernels of the built library by architecture, as cuobjdump reads them: a spilled register has a place on the
    stack."""
    command = [_cuobjdump(), "-res-usage", str(built_library())]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report: dict[str, list[KernelResources]] = {}
    for code in re.split(r"^arch = ", text, flags=re.MULTILINE)[1:]:
        found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", code)
        names = ptxsim.demangle([mangled for mangled, *_ in found])
        report.setdefault(code.split()[0], []).extend(
            KernelResources(_short(name), int(registers), int(local), int(stack), int(shared))
            for name, (_, registers, stack, shared, local) in zip(names, found, strict=True)
        )
    return report


def _cuobjdump() -> str:
    """The toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    places = [Path(ptxsim.find_nvcc()).parent] + (
        [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    )
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, places))) or shutil.which("cuobjdump")
    if not found:
        raise FileNotFoundError("cuobjdump was found neither beside nvcc nor in PATH")
    return found


def _short(name: str) -> str:
    return re.sub(r"distillm::(generic::)?|\(.*\)|^void ", "", name)
