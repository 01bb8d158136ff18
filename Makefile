# `make reproduce` and `make test` do everything from a fresh clone; the second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE  # without bytecode every worker would compile every file anew

.PHONY: install reproduce test record test-all lint format docs readme

install: $(VENV)/installed
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

reproduce: install
	$(BIN)/provenn reproduce eca_net residual_depth --headline --jobs 2 --budget small --out runs/first

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal --skip-passed --durations=20

record: install
	$(BIN)/python -m pytest -n 2 --dist worksteal --skip-passed --record-passed --durations=20

test-all: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "" --record-passed --durations=50

lint: install
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy

format: install
	$(BIN)/ruff format src tests scripts
	$(BIN)/ruff check --fix src tests scripts

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

readme: install
	$(BIN)/python scripts/papers_table.py
