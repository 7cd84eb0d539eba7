# `make demo` and `make test` work on a fresh machine: they make .venv and install what is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-latest bench-env lint format clean

demo: $(INSTALLED) ## Train the digits pipeline, module by module
	$(BIN)/gim-stage run pipelines/digits.toml

test: lint ## Lint, types, layers, and the tests
	$(BIN)/pytest -n auto

test-all: lint ## The same with the long tests
	$(BIN)/pytest -n auto -m "not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The newest torch and torchvision that resolve together, without the audio extra that bounds them.
test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet "pip>=25.1"
	.venv-latest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --group dev --editable ".[large,plot]" soundfile
	.venv-latest/bin/pytest -n auto

# For benchmarks/cache_io.py: other stores, which want an older numpy than constraints.txt has.
bench-env:
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet "pip>=25.1"
	.venv-bench/bin/python -m pip install --quiet --constraint benchmarks/constraints.txt --editable ".[bench]"

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[audio,large,plot,synth]"
	touch $@

clean: ## Remove what was made here; caches under cache/ stay
	rm -rf $(VENV) .venv-latest .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
