# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual
# environment $(VENV) if it is not there.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
# A version manager's stub may be on the path without its Python behind it.
PYTHON := $(shell for each in $(PYTHON) python3.11 python3.12 python3.13 python3; do $$each -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && command -v $$each && break; done)
STAMP = $(VENV)/installed

.PHONY: demo test lint docs help

help:
	@echo "make demo   see forgetting happen, and rehearsal undo it (about a minute)"
	@echo "make test   run all tests"
	@echo "make lint   check style and types"
	@echo "make docs   build the documentation in docs/_build/html"

demo: $(STAMP)
	$(VENV)/bin/ritornello demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Ritornello needs Python 3.11 or newer; say where: make PYTHON=..."; exit 1; }
	@echo "Making $(VENV) with PyTorch and all extras: several GB, some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch torchvision
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[experiments,lightning,accelerate,avalanche,trackers,test,lint,docs]'
	@touch $(STAMP)
