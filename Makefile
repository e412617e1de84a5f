# Commands: `make demo`, `make serve`, `make test`, `make test-all`, `make study`, `make bench` and `make docs`. Each
# creates .venv and installs on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Not the whole directory: users' own scripts lie there, too.
SOURCES := clsd_tf pipelines feature_specs export benchmarks tests setup.py
# Two processes of pytest, a file in one of them: its fixtures are made once.
IN_TWO := -n 2 --dist loadfile

.PHONY: demo serve test test-all lint study bench docs clean-demo

demo: $(INSTALLED)
	$(BIN)/python -m pipelines.demo --demo_dir=demo

serve: $(INSTALLED) demo/servable/models.config
	$(BIN)/python -m export.serve --servable_dir=demo/servable

demo/servable/models.config:
	$(MAKE) demo

# Without the tests marked as long, so that continuous integration has room; test-all runs everything.
test: lint
	$(BIN)/python -m pytest -m "not long" $(IN_TWO)

test-all: lint
	$(BIN)/python -m pytest $(IN_TWO)

# Lint, layout and types; mypy keeps a cache.
lint: $(INSTALLED)
	$(BIN)/python -m ruff check $(SOURCES)
	$(BIN)/python -m ruff format --check $(SOURCES)
	$(BIN)/python -m mypy

study: $(INSTALLED)
	$(BIN)/python -m pipelines.study --study=small --study_dir=study

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.training --work_dir=bench

# Pages of the public API, from docstrings.
docs: $(INSTALLED)
	$(BIN)/python -m pdoc --docformat google --output-directory docs/api clsd_tf feature_specs

clean-demo:
	rm -rf demo

# Reinstalled only when the dependencies change. The stamp is written last, so a broken install is retried.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"clsd_tf needs Python 3.10 to 3.13. Received: Python {v[0]}.{v[1]}. Choose another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)
