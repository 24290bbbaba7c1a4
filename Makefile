# The commands of this repository. `make help` lists them.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000

VENV := .venv
# Each stamp says which extras the environment holds; only a newer pyproject.toml makes it stale.
SERVING := $(VENV)/.installed-serving
TESTING := $(VENV)/.installed-testing
ORACLES := $(VENV)-oracles/.installed

.DEFAULT_GOAL := help
.PHONY: help serve test oracles check format bench clean

help: ## list the commands
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

serve: $(SERVING) ## install what serving needs and serve the starters (HOST, PORT)
	$(VENV)/bin/wattle serve --host $(HOST) --port $(PORT)

test: $(TESTING) ## install what the tests need and run them
	$(VENV)/bin/pytest

oracles: $(ORACLES) ## hold the joules against Zeus and CodeCarbon, in an environment of their own
	$(VENV)-oracles/bin/python -m pytest tests/energy/test_oracles.py

check: $(TESTING) ## lint, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(TESTING) ## format and fix what can be fixed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(TESTING) ## measure Wattle beside its peers and write docs/benchmarks.md (BENCH="--only minilm")
	$(VENV)/bin/python -m loadtests.peers $(BENCH)

clean: ## remove caches and build output; .venv stays
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# bin/activate is the last file that venv writes, so a creation that was interrupted is begun again.
$(VENV)/bin/activate:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Wattle needs Python 3.11 or newer, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -1)." >&2; \
	  echo "Name another one, for example: make $(or $(MAKECMDGOALS),serve) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(SERVING): pyproject.toml | $(VENV)/bin/activate
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[cpu]'
	@touch $@

# Holds what serving needs too, so `make serve` after it installs nothing.
$(TESTING): pyproject.toml | $(VENV)/bin/activate
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[cpu,train,loadtest,report,otel,dev]'
	@touch $(SERVING) $@

$(ORACLES): pyproject.toml
	$(PYTHON) -m venv $(VENV)-oracles
	$(VENV)-oracles/bin/python -m pip install --disable-pip-version-check --quiet -e '.[cpu,dev,oracles]'
	@touch $@
