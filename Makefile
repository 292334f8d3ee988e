# Every target installs what it needs first; nothing but Python 3.11+ with venv is expected.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test soak fuzz lint format demo bench bench-peers gpu-check clean

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

# Some thousand requests made of the server's own description of its API; takes some ten minutes.
fuzz: install
	LONGSPAN_FUZZ_CASES=2000 $(BIN)/python -m pytest -s tests/server/test_fuzz.py

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
bench: bench-attention bench-elasticity bench-generate bench-growth bench-hosts bench-memory \
	bench-needle bench-scaling bench-scheduling bench-serving bench-simulate bench-strategies \
	bench-transport

# Beside vLLM and transformers; makes an environment for vLLM first. A quick look, some minutes:
# `make bench-peers ARGS='--lengths 4096 --batches 1 --dtypes float32'`.
bench-peers: install
	$(BIN)/python benchmarks/peers/compare.py $(ARGS)

bench-%: install
	$(BIN)/python benchmarks/$*.py $(ARGS)

# On a machine with a GPU: correctness and speed there, into benchmarks/results/.
gpu-check: install
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
