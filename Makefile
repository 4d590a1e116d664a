# raylift: make demo | make test | make check | make docs | make clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# make demo CT=folder runs on real CT scans; NO_SERVE=1 ends after the report.
CT ?=
NO_SERVE ?=
PORT ?= 8000

.PHONY: demo test check docs format install install-dev install-docs clean
.DEFAULT_GOAL := demo

demo: install
	$(BIN)/python -m raylift.platform.demo --port $(PORT) $(if $(CT),--ct "$(CT)") $(if $(NO_SERVE),--no-serve)

test: install-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in site/. Warnings are errors, broken links among them.
docs: install-docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m mkdocs build --strict

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

install-docs: $(VENV)/.installed-docs

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,docs]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "raylift needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "cannot make a virtual environment: on Debian, apt install python3-venv"; rm -rf $(VENV); exit 1; }

clean:
	rm -rf demo site .pytest_cache .mypy_cache .ruff_cache
