# `make report` and `make test` set up everything they need except Python 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Two processes of one thread each take the test files in order; by number of tests, long files would come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: report test test-all lab docs bench lint clean

report: $(READY)
	$(BIN)/itae report --profile demo

test: $(READY) lint
	$(PYTEST) -m "not slow"

test-all: $(READY) lint
	$(PYTEST)

lab: $(READY)
	PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter lab --notebook-dir notebooks

# The site holds the demo's report, so that is made first.
docs: report
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build

# About 35 minutes on two cores; for a part of it: make bench BENCH="--parts passes --sizes S"
bench: $(READY)
	$(BIN)/python -m benchmarks.bench $(BENCH)

lint: $(READY)
	$(BIN)/ruff check .

# Made again when it is missing or older than the project file or the lock.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $(READY)

# Reports stay: they may hold hours of work.
clean:
	rm -rf .venv .pytest_cache .ruff_cache docs/_build
