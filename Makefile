# Two commands on a fresh machine: `make demo` and `make test`. Each makes the virtual
# environment $(VENV) if it is not there.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
# A version manager's stub may be on the path without its Python behind it.
PYTHON := $(shell for each in $(PYTHON) python3.11 python3.12 python3.13 python3; do $$each -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null && command -v $$each && break; done)
STAMP = $(VENV)/installed
EXTRAS = experiments,lightning,accelerate,transformers,trl,avalanche,trackers,test,lint,docs
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# What is installed: this checkout, as it is edited; with WHEEL=1 a wheel that is made of it, as users
# get it.
WHEEL ?=

OLDEST = .venv-oldest
# The library, and what a run is; no frameworks and no documentation.
CORE_TESTS = $(wildcard tests/test_*.py) $(addprefix tests/,accelerator loaders simulated records policies transports rounds saving \
	experiments/models experiments/strategies experiments/training/test_run.py)

.PHONY: help demo test test-long clusters lint docs coverage oldest gpu build

help:
	@echo "make demo      see forgetting happen, and rehearsal undo it (about a minute)"
	@echo "make test      run all tests, but for the longest"
	@echo "make test-long run the longest"
	@echo "make clusters  install Ray and DeepSpeed, too, and run their tests"
	@echo "make lint      check style and types"
	@echo "make docs      build the documentation in docs/_build/html"
	@echo "make coverage  run all tests, and show which lines and branches they reach"
	@echo "make oldest    run the core's tests with the oldest versions of everything"
	@echo "make gpu       on a machine with a GPU: its tests and what its path costs"
	@echo "make build     the wheel and the source distribution, in dist/"

demo: $(STAMP)
	$(VENV)/bin/ritornello demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 -m long

clusters: $(STAMP)
	$(PIP) --editable '.[ray,deepspeed]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/integrations/test_ray.py tests/integrations/test_deepspeed.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(VENV)/bin/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# TESTS: some of them only.
coverage: $(STAMP)
	$(VENV)/bin/coverage erase
	OMP_NUM_THREADS=1 $(VENV)/bin/coverage run -m pytest --numprocesses 2 --timeout 300 $(TESTS)
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report

gpu: $(STAMP)
	$(VENV)/bin/python benchmarks/gpu.py

build: $(STAMP)
	$(VENV)/bin/python -m build --no-isolation --outdir dist .

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Ritornello needs Python 3.11 or newer; say where: make PYTHON=..."; exit 1; }
	@echo "Making $(VENV) with PyTorch and all extras: several GB, some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch torchvision
ifeq ($(WHEEL),)
	$(PIP) --editable '.[$(EXTRAS)]'
else
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(VENV)/wheel .
	$(PIP) "$$(ls $(VENV)/wheel/ritornello-*.whl)[$(EXTRAS)]"
endif
	@touch $(STAMP)

# uv, unlike pip, can choose the lowest versions that pyproject.toml allows. They call each other by
# names that are deprecated today.
oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses 2 --timeout 300 \
		-W default::DeprecationWarning $(CORE_TESTS)

$(OLDEST)/installed: pyproject.toml
	python3.11 -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
		--editable '.[experiments,test]'
	@touch $@
