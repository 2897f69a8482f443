# One verb each: demo, test, lint, types, docs, bench. `make demo` and `make test` need Python 3.11+ and nothing else.
#
#   PYTHON=python3.12   the interpreter to build the environment with (else the newest of 3.13, 3.12, 3.11 that runs)
#   VENV=.venv          where the environment goes
#   TORCH_INDEX=URL     take torch and torchvision from there, as https://download.pytorch.org/whl/cpu for a CPU build

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_INDEX ?=
DEMO_WORKSPACE ?= demo_workspace
WORKERS ?= 2

# A pip that sees no find-links: what the machine's configuration names there may hold one of the two torch wheels only.
PIP_ALONE = mkdir -p $(VENV)/no-links && PIP_FIND_LINKS=$(abspath $(VENV))/no-links $(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs bench environment clean

help:  ## list the verbs
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(STAMP)  ## phantoms -> plan -> train -> predict -> evaluate, about 5 minutes on 2 CPU cores
	$(BIN)/samunet_demo --workspace $(DEMO_WORKSPACE)

test: $(STAMP)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

docs: $(STAMP)  ## write documentation/reference/cli.md and the golden list of flags from the parsers
	$(BIN)/python documentation/generate_cli.py
	$(BIN)/python tests/golden/cli_flags.py

bench: $(STAMP)  ## list the benchmarks, or run one: make bench SCRIPT=benchmarks/NAME.py ARGS="..."
	@if [ -n "$(SCRIPT)" ]; then $(BIN)/python $(SCRIPT) $(ARGS); \
	else for f in benchmarks/*.py; do [ -e "$$f" ] && echo "  make bench SCRIPT=$$f" || echo "  no benchmark yet"; done; fi

environment: $(STAMP)  ## create or refresh the environment only

clean:  ## remove the environment and the demo's workspace
	rm -rf $(VENV) $(DEMO_WORKSPACE)

$(BIN)/python:
	@python="$(PYTHON)"; \
	for candidate in $${python:-python3.13 python3.12 python3.11 python3 python}; do \
	  if $$candidate -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "creating $(VENV) with $$($$candidate --version 2>&1) (one time, about 6 GB with CUDA torch; a few minutes)"; \
	    exec $$candidate -m venv $(VENV); \
	  fi; \
	done; \
	echo "no Python 3.11 or newer found: install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2

$(STAMP): pyproject.toml | $(BIN)/python
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  echo "installing torch and torchvision from $(TORCH_INDEX)"; \
	  $(PIP_ALONE) install --index-url $(TORCH_INDEX) torch torchvision; \
	fi
	@echo "installing samunet and its dependencies into $(VENV)"
	@$(BIN)/python -m pip install -e ".[dev]"
	@$(BIN)/python -c "import torchvision" >/dev/null 2>&1 || $(MAKE) --no-print-directory repair-torch
	@touch $@
	@echo "the environment is ready: $(VENV)"

.PHONY: repair-torch
repair-torch:
	@echo "torch and torchvision do not fit each other: installing both again from one index"
	@$(BIN)/python -m pip uninstall --yes torch torchvision
	@{ $(PIP_ALONE) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision \
	  && $(BIN)/python -c "import torchvision"; } || { \
	  echo "import torchvision still fails. Install both from the same place, for example a CPU build:" >&2; \
	  echo "  $(BIN)/python -m pip uninstall --yes torch torchvision" >&2; \
	  echo "  $(BIN)/python -m pip install --index-url https://download.pytorch.org/whl/cpu torch torchvision" >&2; \
	  echo "and look at the message of: $(BIN)/python -c 'import torchvision'" >&2; exit 1; }
