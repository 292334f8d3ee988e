# Every target installs what it needs first; nothing but Python 3.11+ with venv is expected.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test soak lint format demo bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Longspan needs Python 3.11 or later; run 'make PYTHON=python3.11'"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# On two cores; a worker that has done its half of the tests takes some of the other's.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Ten times the steps of the tests' invariants; takes some ten minutes.
soak: install
	LONGSPAN_SOAK_STEPS=1000000 $(BIN)/python -m pytest -s tests/engine/test_invariants.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: install
	$(BIN)/longspan demo

# Not part of the tests: takes minutes each, and wants a machine that does nothing else.
# One of them: `make bench-growth`; its options: `make bench-growth ARGS='--repeats 5'`.
bench: bench-generate bench-needle bench-elasticity bench-growth bench-scheduling bench-simulate \
	bench-strategies bench-hosts

bench-%: install
	$(BIN)/python benchmarks/$*.py $(ARGS)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
