# `make demo` and `make test` set themselves up: a virtual environment in .venv with everything that is needed.
# PyTorch's default build for Linux carries CUDA (2 GB). Without a GPU, a smaller one:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test coverage slow lint types picture bench clean

demo: $(VENV)/.ready
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

# A worker a core, so one thread each: more of them wait for one another, many times as long as they compute.
test coverage slow: export OMP_NUM_THREADS = 1

test: $(VENV)/.eval
	$(BIN)/python -m pytest -n auto

# Apart: measuring slows the tests down. Work in other processes (workers, killed children) is not counted.
coverage: $(VENV)/.eval
	$(BIN)/python -m pytest -n auto --cov=mosectl --cov-report=term-missing:skip-covered

# The tests that `make test` runs in short, in full: 10,000 spoilt inputs of each kind of file, 60 kills of each kind of work.
slow: $(VENV)/.eval
	MOSECTL_FUZZ=10000 MOSECTL_KILLS=60 MOSECTL_MUTANTS=5000 $(BIN)/python -m pytest -n auto -m slow --timeout 7200

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/turns.py
	$(BIN)/python benchmarks/real.py $(REAL:%=--on %)

picture: $(VENV)/.ready
	$(BIN)/python examples/make_picture.py $(MODEL)

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mosectl needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

# Apart: 0.6 GB and most of a minute that the demo does not need; without it the tests of --abilities are skipped, and those
# of pages, which also need a Chromium or Chrome of the system.
$(VENV)/.eval: $(VENV)/.ready
	$(BIN)/pip install --quiet -e ".[eval,browser]"
	touch $@

clean:
	rm -rf $(VENV) .coverage .mypy_cache .ruff_cache .pytest_cache
