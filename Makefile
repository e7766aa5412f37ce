# make demo | test | lint | bench | growth | docs | kaggle: each sets up .venv on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
# Tiny models gain nothing from a second thread, and two test processes fill two cores.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test test-all lint bench growth docs kaggle owner clean

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kdkit needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(DOCS_STAMP): $(STAMP) docs/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/kdkit demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Writes the table of the README anew, also where a claim does not hold; peers come with: pip install -e ".[bench]".
bench: $(STAMP)
	@mkdir -p build
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-sort=name --benchmark-json=build/bench.json; \
		status=$$?; $(BIN)/python tests/benchmarks/readme_table.py build/bench.json README.md; exit $$status

# How cost and memory grow with length, vocabulary, batch and rows: about half an hour of one thread.
growth: $(STAMP)
	$(ONE_THREAD) $(BIN)/python tests/benchmarks/growth.py --output docs/figures

kaggle: owner $(STAMP)
	$(BIN)/kdkit kaggle render --owner "$(OWNER)" $(addprefix --resume ,$(RESUME))

owner:
	@test -n "$(OWNER)" || { echo "name the Kaggle account: make kaggle OWNER=name"; exit 2; }

# KDKIT_SIZE=smoke makes the notebooks short; those that have not changed are not run again.
docs: $(DOCS_STAMP)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --conf-dir docs --doctree-dir build/docs/doctrees . build/docs/html
	@echo "build/docs/html/index.html"

clean:
	rm -rf $(VENV) build dist docs/api *.egg-info
	rm -rf kdkit/__pycache__/kdkit-loops-*
