# `make demo` (set-up and the main job) and `make test` (set-up and the checks of each change) need nothing but Python
# 3.10+, a C++ compiler and PyPI. Both work in .venv. `make test-all` runs every test there is, before a release.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
BIN := $(VENV)/bin
# CUDA kernels are built where nvcc and a CUDA build of torch are found, for the GPU of this machine or else for 9.0.
GPU_ARCHITECTURE := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd';')
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPU_ARCHITECTURE),9.0)
# Processes of pytest; each uses one thread.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: demo demo-tiny test test-all lint types docs native ptx pytest pytest-all benchmark gpu-check clean

demo: $(VENV)/.built
	$(BIN)/distillm demo

demo-tiny: $(VENV)/.built
	$(BIN)/distillm demo --tiny

test: lint types docs native pytest

test-all: lint types docs native pytest-all

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

types: $(VENV)/.built
	$(BIN)/mypy

# The site of the guides and of the API, in build/site. The variable silences an advertisement of the theme's.
docs: $(VENV)/.built
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

native: $(VENV)/.built
	$(BIN)/cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/native -j 2
	$(BIN)/ctest --test-dir build/native --output-on-failure
	$(BIN)/cmake -S . -B build/sanitized -DCMAKE_BUILD_TYPE=Debug -DDISTILLM_SANITIZE=address,undefined \
	    -DPython_EXECUTABLE=/nonexistent
	$(BIN)/cmake --build build/sanitized -j 2
	$(BIN)/ctest --test-dir build/sanitized --output-on-failure
	$(BIN)/cmake -S . -B build/threads -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g" -DDISTILLM_SANITIZE=thread \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/threads -j 2 --target threaded_divergence
	$(BIN)/ctest --test-dir build/threads --output-on-failure -R threaded

# The CUDA kernels that `make test` simulates, in parallel and with a progress line.
ptx: $(VENV)/.built
	$(BIN)/python python_tests/ptx_modules.py

pytest: ptx
	$(PYTEST) -m "not slow and not gpu"

pytest-all: ptx
	$(PYTEST) -m "not gpu"

benchmark: $(VENV)/.built
	$(BIN)/python benchmarks/bench_divergence.py

gpu-check: $(VENV)/.built
	$(BIN)/python benchmarks/device_check.py --out build/device --limit 900

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "numpy>=1.26" "setuptools>=77.0.3" "pybind11>=2.13" "ninja>=1.11.1"
	touch $@

$(VENV)/.built: $(VENV)/.python $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --no-build-isolation -e ".[train,test,dev]"
	touch $@

clean:
	rm -rf build dist *.egg-info distillm_ext/*.so
