# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Page faults of glibc's malloc slow large tensors on a CPU several times; these settings end that (see README).
MALLOC := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456

# The sanitizers' libraries must be loaded before Python's own allocations.
PRELOAD = $(shell $(CC) -print-file-name=libasan.so):$(shell $(CC) -print-file-name=libubsan.so)

.PHONY: demo test bench sanitize lint format clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo   draw, score, time and export with the shipped model; writes out/report.html"
	@echo "make test   run the tests"
	@echo "make bench  time every op and model against PyTorch on this machine; appends to bench/results/"
	@echo "make sanitize  run the tests of the C++ kernels under the address and undefined-behaviour sanitizers"
	@echo "make lint   ruff and mypy"
	@echo "make format let ruff rewrite the layout"
	@echo "make clean  remove .venv, build products and out/"

demo: $(READY)
	@echo "demo: draws, scores, times and exports with the shipped model into out/; 2 minutes on 2 cores"
	@$(MALLOC) $(BIN)/snapgen demo --out out

test: $(READY)
	@echo "test: runs the tests, in two processes; about 10 minutes on 2 cores"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 $(PYTEST)

bench: $(READY)
	@echo "bench: times every op and model against PyTorch, appends to bench/results/; half an hour on 2 cores (BENCH=--quick: a few minutes)"
	@$(BIN)/python -m bench $(BENCH)

sanitize: $(READY)
	@echo "sanitize: builds the extension apart, in build/sanitize, and runs tests/ops on it"
	@rm -rf build/sanitize && mkdir -p build/sanitize
	@cp -r csrc snapgen_kernels snapgen tests setup.py pyproject.toml README.md LICENSE build/sanitize
	@rm -f build/sanitize/snapgen_kernels/_C*.so
	@cd build/sanitize && SNAPGEN_SANITIZE=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	@cd build/sanitize && LD_PRELOAD=$(PRELOAD) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
		$(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider -k "not triton and not cubin and not compile" \
		$(or $(PYTEST),tests/ops)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy snapgen snapgen_kernels bench

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The extension is built in place, so that an edit of csrc/ only needs `make` again.
$(READY): requirements.txt pyproject.toml setup.py $(wildcard csrc/*)
	@echo "setup: makes $(VENV), installs the pinned packages, builds the C++ extension; 3 minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist out *.egg-info
	find . -name '_C*.so' -not -path './$(VENV)/*' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
