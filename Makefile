# make demo   sets up and runs the whole method on made-up data (minutes on two cores)
# make test   sets up and runs all tests
# make lint   ruff and mypy
# make bench  how fast it is, beside the published algorithm (half an hour on two cores); writes benchmarks/RESULTS.md
# make fuzz   feeds damaged input to every reader for ten minutes, and counts what came of it
# make clean  removes what the above made

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench fuzz clean

demo: .venv/.ready
	$(BIN)/python -m demo

test: .venv/.ready-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python -m benchmarks --record benchmarks/RESULTS.md

fuzz: .venv/.ready-dev
	$(BIN)/python -m tests.fuzz

clean:
	rm -rf .venv demo_run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one as in make demo PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.ready: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.ready-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch .venv/.ready $@
