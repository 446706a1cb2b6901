# make run        serve the shipped model, with a playground (creates .venv and installs on the first start)
# make test       install what the tests need and run them all; those of the playground need Debian's chromium,
#                 that of OpenAI's client for Node needs npm, and they skip without
# make test-fast  the tests that are not marked slow, some four minutes on two cores
# make check      formatting, lint, types, fast tests
# make bench      measure this machine, or its GPU, against Transformers and other rivals
# make clean      remove .venv and caches
#
# PYTHON=python3.12     the interpreter for .venv (3.10 or newer)
# TORCH_INDEX_URL=URL   where torch wheels come from; on Linux the default index gives the CUDA build (gigabytes),
#                       https://download.pytorch.org/whl/cpu the small one

PYTHON ?= python3
TORCH_INDEX_URL ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PACKAGE := pyproject.toml setup.py $(wildcard minimax_m1/kernels/csrc/*)
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))
# Two cores run two test processes; more threads than cores make each other slow.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: run test test-fast check bench clean
.DELETE_ON_ERROR:

run: .venv/installed
	@$(BIN)/minimax-m1 serve

test: .venv/installed-dev .venv/installed-node
	$(PYTEST) -n 2

test-fast: .venv/installed-dev
	$(PYTEST) -n 2 -m "not slow"

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -n 2 -m "not slow"

# a fast wrong answer is no result: the oracle tests first
bench: .venv/installed-dev
	$(PYTEST) -n 2 tests/oracle tests/triton
	$(BIN)/minimax-m1 bench

clean:
	rm -rf .venv tests/server/node/node_modules build dist *.egg-info minimax_m1/kernels/_compiled.* .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch alone and first: only this step may look at TORCH_INDEX_URL.
.venv/torch: constraints.txt | .venv/bin/python
	$(PIP) install -c constraints.txt $(TORCH_INDEX) torch
	@touch $@

.venv/installed: .venv/torch $(PACKAGE)
	$(PIP) install -c constraints.txt -e .
	@touch $@

# The package and what its tests need at once, or its kernels would be compiled twice; of the 20,000 Python files of
# what they need most are never imported, and Python compiles those that are.
.venv/installed-dev: .venv/torch $(PACKAGE)
	$(PIP) install --no-compile -c constraints.txt -e ".[dev]"
	@touch .venv/installed $@

# OpenAI's client for Node, which one test drives; without npm that test skips.
.venv/installed-node: tests/server/node/package-lock.json | .venv/bin/python
	@if command -v npm >/dev/null; then npm ci --no-fund --no-audit --prefix tests/server/node; fi
	@touch $@
