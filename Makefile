# What a developer runs. `make setup` is quick once it is done, so every target begins with it.
PYTHON ?= python3
# Tools run as modules: where set-up shares an outer environment, their scripts are in that one's bin.
RUN := .venv/bin/python -m
# One thread: results that do not depend on the machine, and small tensors do not gain from a second.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest
# Two processes halve the suite; a file stays whole, so its fixtures (trained models, servers) are made once.
SHARED_OUT := -n 2 --dist loadfile

.PHONY: setup demo test test-long test-eval check format sanitize bench-smoke docs clean

setup:
	@$(PYTHON) scripts/setup.py

demo: setup
	@$(RUN) scripts.demo

test: setup
	@$(PYTEST) $(SHARED_OUT) -q -m "not slow"

test-long: setup
	@$(PYTEST) $(SHARED_OUT)

# lm-eval comes with 387 MB that nothing else here needs, so it is installed by this target alone (docs/decisions.md).
test-eval: setup
	@$(RUN) lm_eval --help > /dev/null 2>&1 || \
	  $(RUN) pip install --quiet --disable-pip-version-check -c .venv/constraints.txt -e '.[eval]'
	@$(PYTEST) -q tests/contract/test_lm_eval_contract.py tests/test_lm_eval.py

check: setup
	@$(RUN) ruff format --check --quiet . || { echo "check: run 'make format'"; exit 1; }
	@$(RUN) ruff check .
	@$(RUN) mypy
	@$(PYTEST) -q tests/test_architecture.py

format: setup
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on each instruction set that this machine has.
sanitize:
	@cmake -S . -B build/sanitize -DBITLOFT_SANITIZE=ON > /dev/null
	@cmake --build build/sanitize
	@for isa in portable avx2 avx512; do \
	  if BITLOFT_ISA=$$isa build/sanitize/fuzz_matrix 0 > /dev/null; then \
	    BITLOFT_ISA=$$isa build/sanitize/native_tests && BITLOFT_ISA=$$isa build/sanitize/fuzz_matrix || exit 1; \
	  else echo "sanitize: no $$isa here"; fi; \
	done

bench-smoke: setup
	@$(RUN) scripts.bench_smoke

docs: setup
	@$(RUN) zensical build --clean --strict

clean:
	rm -rf .venv demo site .mypy_cache .ruff_cache .pytest_cache .hypothesis
