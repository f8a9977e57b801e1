"""The package as installed: lazy imports, the codec without torch, build information, set-up errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distillm_ext
from distillm_ext import build_info

ROOT = Path(__file__).resolve().parent.parent


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_imports_are_lazy():
    loaded = python(
        "import sys, json, distillm_ext._codec; a = 'torch' in sys.modules;"
        "import distillm_ext; b = 'torch' in sys.modules;"
        "distillm_ext.distillation_loss; c = 'torch' in sys.modules; d = 'transformers' in sys.modules;"
        "print(json.dumps([a, b, c, d]))"
    )
    assert json.loads(loaded) == [False, False, True, False]


def test_public_names():
    for name in distillm_ext.__all__:
        assert getattr(distillm_ext, name) is not None
    assert set(distillm_ext.__all__) <= set(dir(distillm_ext))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distillm_ext.nothing


def test_build_info():
    info = build_info()
    assert info["torch"] == torch.__version__ and info["cpu_isa"] in ("generic", "x86-64-v2", "x86-64-v3", "x86-64-v4")
    assert info["cuda_loaded"] == (info["cuda_reason"] == "")
    assert info["cuda_loaded"] == bool(info["cuda_archs"])


def setup_py(**environment: str) -> str:
    """What setup.py says, with stand-ins for the tools it looks for."""
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def fake_toolkit(folder: Path, version: str) -> Path:
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    (folder / "bin").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.0\n")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (dict(CXX="no-such-compiler"), "no C++ compiler 'no-such-compiler' was found; install g++"),
        pytest.param(
            dict(DISTILLM_CUDA="yes"), "DISTILLM_CUDA must be auto, 0 or 1, got 'yes'", marks=pytest.mark.slow
        ),
    ],
)
def test_setup_errors_are_one_sentence(environment, said):
    assert said in setup_py(**environment)


def test_a_toolkit_that_does_not_fit_is_named(tmp_path):
    if torch.version.cuda is None:
        assert "needs a CUDA build of torch" in setup_py(DISTILLM_CUDA="1")
    else:
        toolkit = fake_toolkit(tmp_path / "cuda", "9.1")
        message = setup_py(DISTILLM_CUDA="1", CUDA_HOME=str(toolkit))
        assert "nvcc 9.1 does not match torch" in message and "DISTILLM_CUDA=0" in message
