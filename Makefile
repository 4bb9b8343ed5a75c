# SPDX-License-Identifier: Apache-2.0
# make setup | demo | test | test-npu | lint | docs | wheels | bench | bench-engine | bench-start; VENV=dir uses another environment, PYTHON=exe creates it with another Python.

VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
MODEL ?=
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak test-npu test-ascendc npu-cost ascendc lint docs wheels bench bench-engine bench-start

help:
	@echo "make setup         install vLLM for CPU and the plugin into the virtual environment $(VENV)"
	@echo "make demo          quantize a small language model, serve it and query it (MODEL=dir: serve that checkpoint)"
	@echo "make test          run linters and all tests"
	@echo "make soak          keep a server busy with 200 clients for three minutes (W4A4_SOAK=SECONDS), then stop it"
	@echo "make test-npu      run only the tests with vllm-ascend, on a stand-in for an NPU, and those of vllm-w4a4 doctor"
	@echo "make test-ascendc  run only the tests of the Ascend C emulator and of the NPU kernels under it (needs no CANN)"
	@echo "make lint          run only the linters"
	@echo "make docs          build the documentation site in site/"
	@echo "make wheels        make the source distribution and the wheels of a release in dist/"
	@echo "make npu-cost      print predicted times of the NPU kernels"
	@echo "make bench         compare the CPU kernels with vLLM's and the machine's limits; writes docs/ (about twelve minutes on an idle machine)"
	@echo "make bench-engine  compare W4A4 with float in vLLM on a model with Qwen3-4B's shape; writes docs/ (20 GB of disk, up to an hour on an idle machine)"
	@echo "make bench-start   time a server from its start to its first answer; writes docs/ (MODEL=dir; default: the demo's; about five minutes on an idle machine)"

setup:
	@command -v $(PYTHON) >/dev/null || { echo "make setup needs python3 (Debian, Ubuntu: apt-get install python3 python3-venv)"; exit 1; }
	@$(PYTHON) tools/setup_environment.py --venv $(VENV) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

demo: setup
	@$(VENV)/bin/python -m tools.demo $(MODEL)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	git ls-files '*.cpp' '*.h' '*.hpp' | xargs -r $(VENV)/bin/clang-format --dry-run --Werror

docs: setup
	$(VENV)/bin/python tools/reference_pages.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

wheels: setup
	@$(VENV)/bin/python tools/release.py

# Two files at a time, because engines spend much of their time starting and compiling on one core.
test: lint test-ascendc
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# Alone, because its 200 clients keep both cores busy.
soak: setup
	W4A4_SOAK=$(or $(W4A4_SOAK),180) $(VENV)/bin/python -m pytest -s tests/engine/test_load.py

# The environment has its own cmake, in case the system has none.
ascendc: setup
	@command -v g++ >/dev/null || { echo "the Ascend C emulator needs g++ 12 or newer (Debian, Ubuntu: apt-get install g++)"; exit 1; }
	@mkdir -p build/ascendc && PATH="$(abspath $(VENV))/bin:$$PATH" && { cmake -S csrc/npu/tests -B build/ascendc && \
	  cmake --build build/ascendc --parallel 2; } >build/ascendc/build.log || { cat build/ascendc/build.log; exit 1; }

test-ascendc: ascendc
	PATH="$(abspath $(VENV))/bin:$$PATH" ctest --test-dir build/ascendc -j2 --output-on-failure

npu-cost: ascendc
	@build/ascendc/cost/npu_cost

test-npu: setup
	for release in 0.23 0.30; do \
	  $(VENV)/bin/python tools/npu_environment.py --release $$release $(VENV)/bin/python -m pytest tests/npu $(PYTEST_ARGS) || exit 1; done
	$(VENV)/bin/python -m pytest tests/capacity tests/cli/test_doctor.py $(PYTEST_ARGS)

bench: setup
	$(VENV)/bin/python -m benchmarks --docs docs

bench-engine: setup
	$(VENV)/bin/python -m benchmarks.end_to_end --profile --docs docs

bench-start: setup
	$(VENV)/bin/python -m benchmarks.start_up $(or $(MODEL),build/demo/smollm2) --docs docs
