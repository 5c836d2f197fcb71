# Setup, demo, tests and benchmarks of hotloop. On a new machine, run `make demo` or `make test`.
#
# PYTHON, TORCH and TEST_WORKERS can be set: make demo TORCH=torch  (the newest torch)
# Whether torch is a build for CPUs or for CUDA depends on pip's index: see README.md, Installing.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
RESULTS ?= results/demo
# The GPU that "make bench-gpu" and "make bench-serving" measure. It names a folder of benchmarks/results and tables of docs/gpu-tables.md and docs/performance.md.
GPU ?= h100
# Processes that run tests, each one file at a time; they share the cores. A crash ends the run.
TEST_WORKERS ?= 2

.PHONY: demo test check bench bench-gpu bench-multi-gpu bench-serving help-pages clean

demo: $(VENV)/installed
	$(BIN)/hotloop pull $(MODEL)
	$(BIN)/hotloop sweep recipes/demo.yaml --out $(RESULTS) --resume
	$(BIN)/hotloop sweep recipes/demo-full.yaml --out $(RESULTS)-full --resume
	$(BIN)/hotloop report $(RESULTS)
	$(BIN)/hotloop report $(RESULTS) $(RESULTS)-full --html

test: check
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

bench: $(VENV)/installed
	$(BIN)/hotloop pull $(MODEL)
	$(BIN)/python benchmarks/side_by_side.py --out results/cpu-side-by-side.json

bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results/$(GPU) --docs docs/gpu-tables.md
	$(BIN)/python benchmarks/small_batches.py --out benchmarks/results/$(GPU)-small-batches --docs docs/performance.md

bench-multi-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/multi_gpu.py --out benchmarks/results/multi-gpu --resume --docs docs/performance.md

bench-serving: $(VENV)/installed
	$(BIN)/python benchmarks/serving.py --out benchmarks/results/$(GPU)-serving --docs docs/performance.md

help-pages: $(VENV)/installed
	$(BIN)/python -m hotloop.cli.help_pages

# torch is installed first and alone, so that the requested build is the one that is installed.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

clean:
	rm -rf $(VENV) results
