# The one front door. `make` lists what it can do.
#
#   PYTHON=...  interpreter to build the environment with (3.11 or later)
#   VENV=...    where the environment lives
#   JOBS=...    tests at a time; 0: one, without workers beside (for a debugger)
#   ARGS=...    passed on, as in: make test ARGS="-k fork -x"

PYTHON ?= $(shell for p in python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && { echo $$p; break; }; done)
VENV ?= .venv
ARGS ?=
JOBS ?= 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# A test that hangs takes its worker along (tests/watchdog.py), and another is started.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 100
# Written last, so that a broken install is repeated.
STAMP := $(VENV)/.installed
PROGRAMS := $(VENV)/.programs
PLOTS := $(VENV)/.plots

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: $(STAMP) ## Merge real data between five processes and prove what it saved
	$(BIN)/sksm demo $(ARGS)

.PHONY: test
test: $(STAMP) ## Run the tests, but for the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

.PHONY: check
check: lint ## Lint, and run the tests that are fast and tell most
	$(PYTEST) -m "check and not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(PROGRAMS) ## Run the slow tests
	$(PYTEST) -m slow $(ARGS)

.PHONY: coverage
coverage: $(STAMP) ## Run the tests and say which lines they missed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow" $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.PHONY: lint
lint: $(STAMP) ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: $(STAMP) ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: $(STAMP) ## Measure speed beside its floor, in one run
	$(BIN)/python -m bench $(ARGS)

.PHONY: bench-programs
bench-programs: $(PROGRAMS) ## Merge real programs that run, and measure what it saves
	$(BIN)/python -m bench.programs $(ARGS)

.PHONY: experiment
experiment: $(PLOTS) ## A thousand processes with patched code, merged again (proposal)
	$(BIN)/python -m bench.experiment --plot experiment.png $(ARGS)

.PHONY: bench-scanner
bench-scanner: $(PROGRAMS) $(PLOTS) ## Guests under `sksm watch` and ksmd; or ARGS=churn
	$(BIN)/python -m bench.scanner $(or $(ARGS),guests --plot scanner.png)

.PHONY: kernel-test
kernel-test: $(STAMP) ## Build Linux with MADV_MERGE, boot it under QEMU, and test it
	$(BIN)/python -m kernel $(ARGS)

.PHONY: venv
venv: $(STAMP) ## Create the environment (the others do it when needed)
	@:

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo >&2 \
	  "sksm needs Python 3.11 or later, and none was found. On Debian:" \
	  "apt-get install python3 python3-venv. Or name one: make PYTHON=/path/to/python3"; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	  "sksm needs Python 3.11 or later, and $(PYTHON) is not: set PYTHON=."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  "$(PYTHON) cannot create environments: its ensurepip module is missing." \
	  "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 \
	  || "$(PYTHON)" -m venv --clear "$(VENV)"
	@$(PIP) install --upgrade --constraint constraints.txt pip
	@$(PIP) install --constraint constraints.txt --build-constraint constraints.txt \
	  --group dev --editable .
	@$(PIP) install --constraint constraints.txt --no-deps --group demo
	@touch $@

# Only where they are asked for: pandas is larger than all the rest.
$(PROGRAMS): $(STAMP)
	@$(PIP) install --constraint constraints.txt --group programs
	@touch $@

$(PLOTS): $(STAMP)
	@$(PIP) install --constraint constraints.txt --group plots
	@touch $@

.PHONY: constraints
constraints: ## Pin the newest versions of everything in constraints.txt
	@set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	"$(PYTHON)" -m venv "$$dir"; \
	pip="$$dir/bin/python -m pip --disable-pip-version-check --quiet"; \
	$$pip install --upgrade pip; \
	$$pip install --group dev --group programs --group plots hatchling editables .; \
	$$pip install --no-deps --group demo; \
	{ echo "# The versions that are tested. Written by: make constraints"; \
	  $$pip freeze --all --exclude sksm --exclude setuptools; } > "$$dir/new"; \
	cp "$$dir/new" constraints.txt

.PHONY: clean
clean: ## Remove the environment and all that was built
	rm -rf "$(VENV)" build dist .coverage .coverage.* .hypothesis \
	  .mypy_cache .pytest_cache .ruff_cache
	find src tests bench kernel -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
