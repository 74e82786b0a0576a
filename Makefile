# make demo   sets up and runs the whole method on synthetic data (minutes on two cores)
# make demo-vla  the same on synthetic text, audio and vision (about a minute)
# make demo-as  the same on synthetic sensor signals (about a minute)
# make test   sets up and runs all tests
# make test-long  also the long ones: runs interrupted anywhere, thousands of steps (10 more minutes on two cores)
# make lint   ruff and mypy
# make bench  speed compared with the published algorithm (half an hour on two cores); writes benchmarks/RESULTS.md
# make fuzz   feeds damaged input to every reader, a thousand variants of each file (ten minutes on two cores)
# make docs   writes docs/options.md from config.py
# make constraints  installs requirements-dev.txt in a fresh environment and pins the result in constraints.txt
# make clean  removes everything created by the above

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Filters `pip freeze`: drops CUDA packages, which a CUDA build of torch pins itself, and local versions (torch's +cpu);
# normalises names as pip does.
PINS := sed -E '/^(pip=|nvidia-|cuda-|triton=)/d; s/\+.*//; s/^[^=]+/\L&/; :a; s/^([^=]*)[_.]/\1-/; ta' | LC_ALL=C sort -t= -k1,1

.PHONY: demo demo-vla demo-as test test-long lint bench fuzz docs constraints clean

demo: .venv/.ready
	$(BIN)/python -m demo

demo-vla: .venv/.ready
	$(BIN)/python -m demo.vla

demo-as: .venv/.ready
	$(BIN)/python -m demo.sensors

test: .venv/.ready-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-long: .venv/.ready-dev
	TEST_LONG=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python -m benchmarks --record benchmarks/RESULTS.md

fuzz: .venv/.ready-dev
	FUZZ_EXAMPLES=1000 $(BIN)/python -m pytest -s tests/test_damage.py

docs: .venv/.ready
	$(BIN)/python -m runs.help

constraints: .venv/bin/python
	rm -rf .venv-constraints
	$(BIN)/python -m venv .venv-constraints
	.venv-constraints/bin/python $(PIP_INSTALL) -r requirements-dev.txt
	.venv-constraints/bin/python -m pip freeze --all > .venv-constraints/frozen.txt
	{ grep '^#' constraints.txt; $(PINS) < .venv-constraints/frozen.txt; } > .venv-constraints/constraints.txt
	mv .venv-constraints/constraints.txt constraints.txt
	rm -rf .venv-constraints

clean:
	rm -rf .venv .venv-constraints demo_run .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: expected Python 3.11 or newer; choose one with make demo PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.ready: requirements.txt constraints.txt | .venv/bin/python
	$(BIN)/python $(PIP_INSTALL) -r requirements.txt -c constraints.txt
	@touch $@

.venv/.ready-dev: requirements-dev.txt requirements.txt constraints.txt | .venv/bin/python
	$(BIN)/python $(PIP_INSTALL) -r requirements-dev.txt -c constraints.txt
	@touch .venv/.ready $@
