# Two commands on a fresh machine: `make demo` runs the instrument, `make test` passes the tests.
# Both make their own environment in .venv; nothing else has to be installed by hand.

PYTHON ?= python3
VENV := .venv
# Two workers, also where there are more cores: many tests start processes of their own. A file's
# tests stay together, for they share what is dear to set up. ARGS come last: `-n 0` undoes it.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint types chromium h5dump samples benchmarks clean

help:
	@echo "make demo     set up, train three optimizers side by side, watch them in the browser"
	@echo "make test     set up, then lint, check types and run all tests (installs Chromium)"
	@echo "make samples  record sample_runs/*.h5 anew"
	@echo "make benchmarks   measure what recording, an optimizer step and the page cost (an hour)"
	@echo "make clean    remove what these commands made"

demo: $(VENV)/ready
	$(BIN)/normuon-lens demo $(ARGS)

test: $(VENV)/ready-for-tests chromium h5dump lint types
	@echo "== tests"
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

lint: $(VENV)/ready-for-tests
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Against an unpacked wheel, where the wings stand at their import names.
types: $(VENV)/ready-for-tests
	@echo "== types"
	@rm -rf build
	@$(PIP) wheel -q --no-deps -w build/wheel .
	@cd build && $(CURDIR)/$(BIN)/python -m zipfile -e wheel/*.whl unpacked
	@cd build/unpacked && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p normuon_lens

chromium:
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh .ci/chromium

h5dump:
	@sh .ci/h5dump

samples: $(VENV)/ready
	$(BIN)/python -m normuon_lens.sample_runs.remake

benchmarks: $(VENV)/ready
	@$(PIP) install -q -c constraints.txt -e '.[benchmarks]'
	$(BIN)/python benchmarks/recording_overhead.py
	$(BIN)/python benchmarks/sharded_overhead.py
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/dashboard_latency.py
	$(BIN)/python benchmarks/spectra_throughput.py

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "make: $(PYTHON) is not Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "== making the environment $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
	@touch $@

$(VENV)/ready: $(VENV)/made pyproject.toml constraints.txt
	@echo "== installing normuon-lens with PyTorch (a few minutes the first time)"
	@$(PIP) install -q -c constraints.txt -e '.[torch]' || \
	  { echo "make: installing failed; is the package index reachable?" >&2; exit 2; }
	@touch $@

$(VENV)/ready-for-tests: $(VENV)/ready
	@echo "== installing the test tools"
	@$(PIP) install -q -c constraints.txt -e '.[dev]' || \
	  { echo "make: installing failed; is the package index reachable?" >&2; exit 2; }
	@touch $@
