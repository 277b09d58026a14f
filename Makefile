# make demo   train a small real model with DPO, on a CPU, in a few minutes
# make test   every test that this machine can run
# make lint   ruff and mypy
# make readme   tables and charts of the README from bench/results (ARGS=--check: do they agree?)
# make gpu-check   tests and figures that need a GPU, in nine minutes, with the interpreter PYTHON
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test lint readme gpu-check clean
# An interrupted or failed install must not look like a finished one.
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m fastdpo.demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

readme: $(VENV)/.installed-dev
	$(BIN)/python -m bench.readme $(ARGS)

# No virtual environment: a GPU machine has its own torch and triton, and perhaps no network.
gpu-check:
	$(PYTHON) -m bench.gpu_check $(ARGS)

$(VENV)/.installed-%: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
		echo "$(PYTHON): expected Python 3.10, 3.11 or 3.12; choose one: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build outputs *.egg-info
