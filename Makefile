# Everything here sets itself up: QEMU and tools by apt (once, as root), Python packages into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench tools clean
.DEFAULT_GOAL := test

tools:
	PYTHON=$(PYTHON) sh tests/guest/install.sh

$(STAMP): pyproject.toml | tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# A guest under load is backed up to a slow target, restored, and proven right (about a minute).
demo: tools $(STAMP)
	$(BIN)/python -m benchmarks.demo

# Style, types, layers; then the tests, on real QEMU with real guests.
test: tools lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: tools $(STAMP)
	$(BIN)/python -m benchmarks.guest_impact
	$(BIN)/python -m benchmarks.admission

clean:
	rm -rf $(VENV) .cache
