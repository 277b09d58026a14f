# make demo   train a small real model with DPO, on a CPU, in a few minutes
# make test   every test that this machine can run
# make test-newest   the same on the newest releases that setup.py admits, beside the pinned ones
# make mutants   which small faults of kernels/ no test notices (ARGS="--sample 300 --seed 1")
# make lint   ruff and mypy
# make constraints   write the pins of all of these (ARGS=--upgrade: on the newest releases)
# make readme   what README and docs show, from bench/results and fastdpo/config (ARGS=--check: does it?)
# make cards   what the kernels need on every card, compiled without a GPU (then: make readme)
# make gpu-check   tests and figures that need a GPU, in nine minutes, with the interpreter PYTHON
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet
RELEASES ?= --constraint constraints.txt

.PHONY: demo test test-newest mutants lint constraints readme cards gpu-check clean
# An interrupted or failed install must not look like a finished one.
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python -m fastdpo.demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-newest:
	rm -f $(VENV)-newest/.installed-test
	$(MAKE) VENV=$(VENV)-newest RELEASES='--upgrade --upgrade-strategy eager' test

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without the packages of setup.py, whose ranges may have left the pins behind.
constraints: | $(BIN)/python
	$(PIP_INSTALL) --constraint constraints.txt uv
	echo ./kernels | $(BIN)/uv pip compile - setup.py --extra dev --universal \
		--python-version 3.10 --quiet --no-emit-index-url --no-emit-package fastdpo-kernels \
		--no-annotate --custom-compile-command 'make constraints' \
		--output-file constraints.txt $(ARGS)

readme: $(VENV)/.installed-dev
	$(BIN)/python -m bench.report $(ARGS)
	$(BIN)/python docs/generate.py $(ARGS)

cards: $(VENV)/.installed-dev
	cd kernels && ../$(BIN)/python -m fastdpo_kernels.triton.compile \
		--json ../bench/results/cards.jsonl $(ARGS)

# No virtual environment: a GPU machine has its own torch and triton, and perhaps no network.
gpu-check:
	$(PYTHON) -m bench.gpu_check $(ARGS)

# The build's own environment would take the newest setuptools, pinned or not.
$(VENV)/.installed-%: setup.py kernels/setup.py pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) $(RELEASES) setuptools
	$(PIP_INSTALL) $(RELEASES) --no-build-isolation --editable ./kernels --editable '.[$*]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON): expected Python 3.10 to 3.14; choose one: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(VENV)-newest build outputs *.egg-info
