# `make demo` and `make test` work on a fresh machine that has python3 (>= 3.11) with venv, and make.

PYTHON ?= python3
# Another interpreter than the default has a virtual environment of its own: `make test PYTHON=python3.13`.
ifeq ($(origin PYTHON),file)
VENV   ?= .venv
else ifeq ($(origin VENV),undefined)
VENV   := .venv-$(shell $(PYTHON) -c 'import platform, sys; print(platform.python_version() + sys.abiflags)' 2>/dev/null)
endif
BIN    := $(VENV)/bin
PYTEST_ARGS ?=

# Tests wait for processes more than they compute, so several run at a time, each as slowly as it then must.
TESTS_AT_ONCE ?= $(shell expr 3 '*' $$(nproc))
export HOTPORT_TEST_SLOWNESS ?= 2

# Tests that need no service compute more than they wait; each process more takes 4 s to start.
QUICK_AT_ONCE ?= $(shell expr 2 '*' $$(nproc))

# Each process would rewrite the assertions of all test modules anew.
unexport PYTHONDONTWRITEBYTECODE

# Absolute, because workers are measured too and run in directories of their own.
export COVERAGE_FILE := $(CURDIR)/build/coverage/data

.PHONY: help demo test quick pythons lowest soak lint format bench bench-report clean debian docs dist

help:
	@echo "make demo    install, then restart a real app under load and show what its clients saw"
	@echo "make test    lint, types, import contracts, tests, coverage"
	@echo "make soak    what make test repeats a few times, 20 times and at every step; takes half an hour"
	@echo "make lint    the first half of it"
	@echo "make quick   the tests that run in one process, without coverage"
	@echo "make pythons the same on each other Python that this machine has"
	@echo "make lowest  the same with the lowest versions that pyproject.toml allows"
	@echo "             all of them with another Python: make test PYTHON=python3.13"
	@echo "make format  let ruff rewrite what it can"
	@echo "make docs    the documentation as a site, in build/site/html"
	@echo "make dist    sdist and wheel in dist/, checked"
	@echo "make bench   the benchmarks; takes minutes, wants a quiet machine"
	@echo "make clean   remove the virtual environments and every cache"

demo: $(VENV)/.demo
	$(BIN)/hotport demo

# Pytest rewrites the assertions of all test modules once, on the core that mypy leaves; otherwise each of its processes does.
test: $(VENV)/.dev debian
	@$(BIN)/python -m pytest --collect-only -qq >/dev/null 2>&1 & $(MAKE) lint; status=$$?; wait; exit $$status
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(TESTS_AT_ONCE) --dist worksteal $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage report --include='src/hotport/model/*,src/hotport/wire/*' --fail-under=100

soak: $(VENV)/.dev debian
	HOTPORT_TEST_RESTARTS=20 $(BIN)/pytest -n $(TESTS_AT_ONCE) --dist worksteal -m soak $(PYTEST_ARGS)

# What an interpreter or a dependency can break. (Other frameworks' looks are the same everywhere, and many to install.)
QUICK := tests/model tests/wire tests/kernel tests/worker tests/adapters tests/service/test_smoke.py
RUN_QUICK = -m pytest -n $(QUICK_AT_ONCE) --dist worksteal --ignore tests/adapters/test_target.py $(PYTEST_ARGS)

quick: $(VENV)/.quick
	$(BIN)/python $(RUN_QUICK) $(QUICK)

# With eager tasks on asyncio's own event loop, as applications may want them (tests/conftest.py).
pythons:
	@HOTPORT_TEST_EAGER=asyncio tests/pythons.sh '$(PYTHON)' $(MAKE) quick

# Each direct dependency at its bound; with tests of what the command line and the extras need.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/supervisor tests/churn tests/service/test_watch.py tests/service/test_demo.py

lowest: $(LOWEST)/.quick
	$(LOWEST)/bin/python $(RUN_QUICK) $(QUICK) $(LOWEST_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/python -m docs.site
	cd build/site && $(abspath $(BIN))/zensical build --strict --clean

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist

bench: $(VENV)/.dev debian
	$(BIN)/python benchmarks/steady.py
	$(BIN)/python benchmarks/restart.py
	$(BIN)/python benchmarks/http.py
	$(BIN)/python benchmarks/rebind.py
	$(BIN)/python benchmarks/gap.py
	$(BIN)/python benchmarks/timewait.py
	$(BIN)/python benchmarks/why.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/open.py
	$(BIN)/python benchmarks/handoff.py
	$(BIN)/python benchmarks/power.py
	$(BIN)/python benchmarks/hostile.py
	$(BIN)/python benchmarks/balance.py
	$(BIN)/python benchmarks/sharing.py
	$(BIN)/python benchmarks/floor.py
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/tls.py
	$(MAKE) bench-report

bench-report: $(VENV)/.dev
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

debian:
	@tests/debian.sh

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: hotport needs Python >= 3.11; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'  # the first that knows --group

$(LOWEST)/.quick: pyproject.toml tests/lowest.py | $(BIN)/python
	$(BIN)/python -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(LOWEST)/bin/python tests/lowest.py >$(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet --constraint $(LOWEST)/constraints.txt --editable '.[all,locust]' --group quick
	@touch $@

# The stamps make the second run quick: nothing is installed again until pyproject.toml changes.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/pip install --quiet --editable '.[all]' --group dev
	@touch $@ $(VENV)/.quick $(VENV)/.demo $(VENV)/.docs

$(VENV)/.quick: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[all]' --group quick
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable . --group docs
	@touch $@

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@
