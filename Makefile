# make run and make test need Python >= 3.11 and make; nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
DATA ?= .loraplex
PORT ?= 8000
# processes that run tests; each takes up to 2 GB
WORKERS ?= 2

.PHONY: help run test test-slow fuzz check format bench demo demo-model matrix coverage clean

help:
	@echo "make run         serve the demo on http://127.0.0.1:$(PORT)"
	@echo "make test        run the tests"
	@echo "make fuzz        20,000 spoilt uploads over HTTP: minutes"
	@echo "make check       linter, formatter, types, layout"
	@echo "make bench       the CPU bars, measured: minutes, and gigabytes in the temporary folder"
	@echo "make demo        all demo tasks in mixed batches, with scores"
	@echo "make matrix      write the README's table of architectures and adapters, from the tests"
	@echo "make demo-model  train the demo base and its adapters again from seeds, 20 minutes or more"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("loraplex needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(DEV_STAMP): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(STAMP)

run: $(STAMP)
	$(BIN)/loraplex serve --data-dir $(DATA) --port $(PORT)

demo: $(STAMP)
	$(BIN)/loraplex demo

test: $(DEV_STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not fuzz"

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slow

fuzz: $(DEV_STAMP)
	nice -n 10 $(BIN)/python -m pytest -m fuzz -s

coverage: $(DEV_STAMP)
	$(BIN)/python -m coverage erase
	NUMBA_DISABLE_JIT=0 $(BIN)/python -m coverage run -m pytest -q -m "not slow and not fuzz"
	$(BIN)/python -m coverage report

check: $(DEV_STAMP)
	$(BIN)/ruff check server tests
	$(BIN)/ruff format --check server tests
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix server tests
	$(BIN)/ruff format server tests

bench: $(STAMP)
	$(BIN)/loraplex bench bars

demo-model: $(DEV_STAMP)
	$(BIN)/python -m loraplex.demo.build

matrix: $(DEV_STAMP)
	PYTHONPATH=server:tests:tests/model $(BIN)/python tests/model/matrix.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .coverage
