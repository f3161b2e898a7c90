# The two commands of the README: `make quickstart` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
CPP    := $(shell git ls-files '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh' 2>/dev/null)
RUN    ?= runs/quickstart

.PHONY: help quickstart test lint format kernel-tests cuda-check triton-check pytest isa-tests bench sanitize gpu \
        gpu-rehearsal clean

help:  ## This list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ibq_fast needs Python 3.10 or newer; set PYTHON=/path/to/python3."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch 'setuptools>=77' wheel cmake ninja
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# Always asks CMake, which rebuilds only what changed.
.PHONY: build
build: $(STAMP)
	$(PY) setup.py -q build_ext --inplace

quickstart: build  ## Train, sample and report on embedded real images: runs/quickstart/report.md
	$(PY) -m ibq_fast.quickstart --out $(RUN)

test: lint kernel-tests sanitize cuda-check triton-check pytest isa-tests  ## Everything: lint, types, CTest, sanitizers, GPU compile checks, pytest

lint: $(STAMP)  ## ruff, mypy, clang-format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(STAMP)  ## Rewrite sources in the house format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

kernel-tests: build  ## CTest of kernels/, without Python or PyTorch
	$(VENV)/bin/cmake --build build/cmake --target kernel_tests --parallel $(JOBS)
	$(VENV)/bin/ctest --test-dir build/cmake --output-on-failure --parallel $(JOBS)

cuda-check: build  ## Compile the CUDA kernels for sm_80, sm_90a and sm_100a, read registers and spills, link
	@if grep -q 'CMAKE_CUDA_COMPILER:' build/cmake/CMakeCache.txt; then \
	  $(VENV)/bin/cmake --build build/cmake --target ibq_cuda_check ibq_cuda_link_check; \
	else echo "cuda-check: no nvcc on this machine, CUDA kernels were not compiled"; fi

triton-check: $(STAMP)  ## Compile the Triton kernels for sm_80, sm_90 and sm_100 and read registers and spills
	$(PY) tools/triton_check.py --budgets ibq_fast/ops/triton/budgets.json --jobs $(JOBS)

# Tests share the cores: threads that wait for others must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest -q -n $(JOBS)

pytest: build  ## The Python tests
	$(PYTEST) --durations=15

bench: build  ## Measure everything against its peers (long: the largest sizes take minutes each): docs/benchmarks.md
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[bench]'
	$(PY) -m bench.report $(BENCH)

# The ops with each older instruction set forced; the best one is what `pytest` ran.
isa-tests: build  ## The native ops under every instruction set this CPU has
	@for isa in $$($(PY) -c 'import torch, ibq_fast._C as c; print(*c.cpu_isas().split(",")[1:])'); do \
	  echo "IBQ_FAST_CPU_ISA=$$isa"; \
	  IBQ_FAST_CPU_ISA=$$isa $(PYTEST) tests/ops/test_index_backprop.py tests/ops/test_search.py \
	    tests/ops/test_cross_entropy.py tests/ops/test_skinny_linear.py tests/generator/test_decoder.py \
	    tests/test_quantizer_golden.py -k 'native' || exit 1; \
	done

sanitize: $(STAMP)  ## CTest under the address and undefined-behaviour sanitizers
	$(VENV)/bin/cmake -S . -B build/sanitize -DIBQ_FAST_SANITIZE=ON -DIBQ_FAST_EXTENSION=OFF -DIBQ_FAST_CUDA=off
	$(VENV)/bin/cmake --build build/sanitize --target kernel_tests --parallel $(JOBS)
	$(VENV)/bin/ctest --test-dir build/sanitize --output-on-failure --parallel $(JOBS)

# On the Python that PYTHON names, with what is installed there: nothing is downloaded.
gpu:  ## Build, check, measure, sanitize on this machine's GPU, in five minutes: bench/results/gpu.csv
	$(PYTHON) tools/gpu_suite.py $(GPU)

gpu-rehearsal: build  ## The same stages on the CPU with tiny shapes
	$(PY) tools/gpu_suite.py --device cpu $(GPU)

clean:  ## Remove what was built (the environment stays)
	rm -rf build dist ibq_fast/*.so *.egg-info
