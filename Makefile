# `make run` and `make test` need nothing but Python 3.11 or newer, a shell and the package index.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: run test test-long test-oldest bench lint types clean

run: .venv/run  ## the main job: one network under every strategy
	$(BIN)/tamegrad compare

test: .venv/test
	$(BIN)/python -m pytest

test-long: .venv/test  ## the property tests with 20,000 examples a backend; one test takes minutes
	$(BIN)/python -m pytest tests/contract/test_properties.py --hypothesis-profile=long --timeout=1800

test-oldest: .venv-oldest/test  ## everything with the oldest versions that pyproject.toml allows; downloads gigabytes
	.venv-oldest/bin/python -m pytest --ignore=src/tamegrad/jax --ignore=docs/jax.md

bench: .venv/bench  ## tamegrad's speed beside other tools', about eight minutes; refuses if the contract suite is red
	$(BIN)/python benchmarks/speed.py --write docs/speed.md
	$(BIN)/python benchmarks/speed_jax.py --write docs/speed-jax.md

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Each stamp is for one set of extras, and is made again when the files it was installed from change.
.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torch,cpu,study]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torch,cpu,study,test]'
	touch $@

.venv/bench: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torch,cpu,bench,test]'
	touch $@

# Triton and JAX have no version that goes with these; their tests are skipped.
.venv-oldest/test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-oldest.txt \
		--editable '.[torch,cpu,study]' hypothesis pytest pytest-timeout
	touch $@
