# SPDX-License-Identifier: Apache-2.0
# make setup | demo | test | test-npu | lint | bench | bench-engine; VENV=dir uses another environment, PYTHON=exe another Python to make it with.

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
MODEL ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-npu test-ascendc npu-cost ascendc lint bench bench-engine

help:
	@echo "make setup   virtual environment $(VENV) with vLLM for CPU and the plugin"
	@echo "make demo    quantize a small language model, serve it and ask it a question (MODEL=dir: serve that one)"
	@echo "make test    style checks and all tests"
	@echo "make test-npu  those beside vllm-ascend alone, on a stand-in for an NPU, and those of the doctor"
	@echo "make test-ascendc  the Ascend C emulator, and the NPU kernels under it: conformance, hazards, mutants (no CANN needed)"
	@echo "make npu-cost  predicted times of the NPU kernels"
	@echo "make lint    style checks alone"
	@echo "make bench   the CPU kernels beside vLLM's and the machine's limits, into docs/ (some ten minutes, idle machine)"
	@echo "make bench-engine   vLLM on a model of Qwen3-4B's shape, W4A4 beside float (20 GB of disk, up to an hour, idle machine)"

setup:
	@command -v $(PYTHON) >/dev/null || { echo "make setup needs python3 (Debian, Ubuntu: apt-get install python3 python3-venv)"; exit 1; }
	@$(PYTHON) tools/setup_environment.py --venv $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

demo: setup
	@$(VENV)/bin/python tools/demo.py $(MODEL)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	git ls-files '*.cpp' '*.h' '*.hpp' | xargs -r $(VENV)/bin/clang-format --dry-run --Werror

# Two files at a time: engines start and compile on one core for much of their time.
test: lint test-ascendc
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# The environment has a cmake of its own where the system has none.
ascendc: setup
	@command -v g++ >/dev/null || { echo "the Ascend C emulator needs g++ 12 or newer (Debian: apt-get install g++)"; exit 1; }
	@mkdir -p build/ascendc && PATH="$(abspath $(VENV))/bin:$$PATH" && { cmake -S csrc/npu/tests -B build/ascendc && \
	  cmake --build build/ascendc --parallel 2; } >build/ascendc/build.log || { cat build/ascendc/build.log; exit 1; }

test-ascendc: ascendc
	PATH="$(abspath $(VENV))/bin:$$PATH" ctest --test-dir build/ascendc -j2 --output-on-failure

npu-cost: ascendc
	@build/ascendc/cost/npu_cost

test-npu: setup
	$(VENV)/bin/python tools/npu_environment.py $(VENV)/bin/python -m pytest tests/npu $(PYTEST_ARGS)
	$(VENV)/bin/python -m pytest tests/capacity tests/cli/test_doctor.py $(PYTEST_ARGS)

bench: setup
	$(VENV)/bin/python -m benchmarks --docs docs

bench-engine: setup
	$(VENV)/bin/python -m benchmarks.end_to_end --profile --docs docs
