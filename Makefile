# Everything from a fresh clone with only Python 3.11 or newer. The first call builds .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test bench docs lint types
help:
	@echo "make demo   compare four attentions on recall and real text (6 minutes, 2 cores)"
	@echo "make test   the test suite (under 20 minutes, 2 cores)"
	@echo "make bench  speed on this CPU beside the peers"
	@echo "make docs   the documentation, docs/_build/html/index.html"
	@echo "make lint   ruff, format check; make types: mypy"

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	       "name another with: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.installed
	$(BIN)/subquad compare --preset demo --out runs/demo

# Two workers of one thread each: faster than two that fight over the cores.
test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

bench: .venv/.installed
	$(BIN)/python benchmarks/cpu.py

docs: .venv/.installed
	rm -rf docs/_build docs/api
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy
