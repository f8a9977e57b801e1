"""Builds the extension: `_C` (schemas, CPU operators) and `_codec` (NumPy codec) always, `_C_cuda` where CUDA is found.

Environment: DISTILLM_CUDA = auto | 0 | 1 (auto: build the CUDA kernels when nvcc and a CUDA build of torch are there),
DISTILLM_LINEINFO = 0 | 1 (1: the CUDA kernels carry source lines for Nsight Compute and compute-sanitizer; their code
is the same, but the library then names the folder it was built in), TORCH_CUDA_ARCH_LIST (default below), CXX,
CUDA_HOME, MAX_JOBS.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# One library for every torch from 2.10 on.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# Without trapping-math semantics g++ may turn a select into a vector blend; unswitching a loop on a row constant would
# leave one of the two copies scalar. Values are unaffected.
VECTORISE = ["-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno", "-fno-unswitch-loops"]
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", *VECTORISE, "-fvisibility=hidden"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fvisibility=hidden", "-DUSE_CUDA"]


def fail(sentence: str) -> None:
    sys.exit(f"distillm_ext: {sentence}")


def sources(folder: str, *suffixes: str) -> list[str]:
    """All in a folder of csrc and in those within. No two may differ in the suffix alone, as their objects do not."""
    found = sorted(path for path in (ROOT / "csrc" / folder).rglob("*") if path.suffix in suffixes)
    return [str(path.relative_to(ROOT)) for path in found]


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        fail(
            f"no C++ compiler '{compiler}' was found; install g++ 9 or newer (Debian and Ubuntu: apt-get install g++) "
            "or set CXX to one."
        )


def find_cuda_home() -> str | None:
    """The toolkit with headers. A wrapper script named nvcc may stand in a folder that has none: ask nvcc itself."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc:
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
        candidates += [str(Path(nvcc).resolve().parent.parent), top and str(Path(top[1].strip()).resolve())]
    candidates.append("/usr/local/cuda")
    for home in candidates:
        if home and (Path(home) / "include" / "cuda_runtime.h").exists() and (Path(home) / "bin" / "nvcc").exists():
            return home
    return None


def nvcc_version(home: str) -> str:
    text = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def line_info() -> list[str]:
    """The nvcc flags that DISTILLM_LINEINFO asks for."""
    wanted = os.environ.get("DISTILLM_LINEINFO", "0")
    if wanted not in ("0", "1"):
        fail(f"DISTILLM_LINEINFO must be 0 or 1, got '{wanted}'.")
    return ["-lineinfo"] if wanted == "1" else []


def cuda_home_to_use(torch_cuda: str | None) -> str | None:
    """Where to build the CUDA kernels from, or None for a build without them."""
    wanted = os.environ.get("DISTILLM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        fail(f"DISTILLM_CUDA must be auto, 0 or 1, got '{wanted}'.")
    if wanted == "0" or (wanted == "auto" and torch_cuda is None):
        return None
    if torch_cuda is None:
        fail("DISTILLM_CUDA=1 needs a CUDA build of torch, this one is CPU-only; install one or set DISTILLM_CUDA=0.")
    home = find_cuda_home()
    if home is None:
        if wanted == "1":
            fail(f"no nvcc with headers was found; install the CUDA toolkit {torch_cuda} or set CUDA_HOME to it.")
        return None
    version = nvcc_version(home)
    if version.split(".")[0] != str(torch_cuda).split(".")[0]:
        fail(
            f"nvcc {version} does not match torch, which was built with CUDA {torch_cuda}; install that toolkit, set "
            "CUDA_HOME to it, or set DISTILLM_CUDA=0 to build without CUDA kernels."
        )
    return home


def extensions() -> tuple[list[Extension], dict[str, type]]:
    import pybind11
    import torch

    home = cuda_home_to_use(torch.version.cuda)
    if home:
        os.environ["CUDA_HOME"] = home  # read by cpp_extension when it is imported
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    version = f'-DDISTILLM_TORCH_VERSION="{torch.__version__}"'
    modules = [
        CppExtension(
            "distillm_ext._C",
            ["csrc/library.cpp", *sources("cpu", ".cpp")],
            extra_compile_args={"cxx": [*CXX_FLAGS, *STABLE_ABI, version]},
        ),
        Extension(
            "distillm_ext._codec",
            ["csrc/codec.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args={"cxx": CXX_FLAGS},
        ),
    ]
    if home:
        listed = f'-DDISTILLM_CUDA_ARCHITECTURES="{architectures.replace(";", " ")}"'
        modules.append(
            CUDAExtension(
                "distillm_ext._C_cuda",
                sources("cuda", ".cpp", ".cu"),
                extra_compile_args={
                    "cxx": [*CXX_FLAGS, *STABLE_ABI, listed],
                    "nvcc": [*NVCC_FLAGS, *STABLE_ABI, *line_info()],
                },
            )
        )
    return modules, {"build_ext": BuildExtension}


if {"build_ext", "bdist_wheel", "editable_wheel", "develop", "install", "build"} & set(sys.argv):
    check_compiler()
    ext_modules, cmdclass = extensions()
    setup(ext_modules=ext_modules, cmdclass=cmdclass)
else:  # metadata and source distributions need no compiler
    setup()
