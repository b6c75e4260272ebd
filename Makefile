# What a developer runs. `make setup` is quick once it is done, so every target begins with it.
PYTHON ?= python3
BIN := .venv/bin
# One thread: results that do not depend on the machine, and small tensors do not gain from a second.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo test test-long check format bench-smoke docs clean

setup:
	@$(PYTHON) scripts/setup.py

demo: setup
	@$(BIN)/python -m scripts.demo

test: setup
	@$(PYTEST) -q -m "not slow"

test-long: setup
	@$(PYTEST)

check: setup
	@$(BIN)/ruff format --check --quiet . || { echo "check: run 'make format'"; exit 1; }
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -q tests/test_architecture.py

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench-smoke: setup
	@$(BIN)/python scripts/bench_smoke.py

docs: setup
	@$(BIN)/zensical build --clean --strict

clean:
	rm -rf .venv demo site .mypy_cache .ruff_cache .pytest_cache .hypothesis
