# Everything a fresh clone needs: `make demo`, `make test`. The first call builds .venv.
PYTHON ?= python3
BIN := .venv/bin

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: test
test: .venv/.installed
	$(BIN)/python -m pytest
