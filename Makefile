# `make run` and `make test` need nothing but Python 3.11 or newer, a shell and the package index.
PYTHON ?= python3
BIN := .venv/bin
IN_EMPTY := .venv-dist/empty/bin/python
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: run test test-long test-oldest test-ecosystem bench gpu dist lint types clean

run: .venv/run  ## the main job: one network under every strategy
	$(BIN)/tamegrad compare

test: .venv/test  ## everything, on all cores
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-long: .venv/test  ## the property tests with 20,000 examples a backend, and a million groups in bulk
	$(BIN)/python -m pytest tests/contract/test_properties.py tests/contract/test_bulk.py --hypothesis-profile=long --timeout=1800

test-oldest: .venv-oldest/test  ## everything with the oldest versions that pyproject.toml allows; downloads gigabytes
	.venv-oldest/bin/python -m pytest --ignore=src/tamegrad/jax --ignore=docs/jax.md

test-ecosystem: .venv-ecosystem/test .venv-ecosystem-older/test  ## with other libraries, minutes; downloads gigabytes
	.venv-ecosystem/bin/python -m pytest tests/ecosystem
	TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 .venv-ecosystem-older/bin/python -m pytest \
		tests/ecosystem/test_transformers_trainer.py

bench: .venv/bench  ## tamegrad's speed beside other tools', about ten minutes; refuses if the contract suite is red
	$(BIN)/python benchmarks/speed.py --write docs/speed.md
	$(BIN)/python benchmarks/in_backward.py --write docs/step-in-backward.md
	$(BIN)/python benchmarks/speed_jax.py --write docs/speed-jax.md

# The wheel is tried in an empty environment, first with NumPy alone; -I makes Python ignore the clone.
dist: .venv-dist/build  ## wheel and sdist, in dist/
	rm -rf dist .venv-dist/empty
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-dist/bin/python -m build
	$(PYTHON) -m venv .venv-dist/empty
	$(IN_EMPTY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	$(IN_EMPTY) -I -c "import numpy, tamegrad; \
		gradients, report = tamegrad.normalize({'dense': {'weight': numpy.ones(4)}}, tamegrad.Clip(1.0)); \
		assert (gradients['dense']['weight'] == 0.5).all() and report['dense'].norm == 2.0"
	$(IN_EMPTY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		"$$(echo dist/*.whl)[study]"
	.venv-dist/empty/bin/tamegrad --help

gpu: .venv/test  ## checks and times everything on one GPU, at most eight minutes; without a GPU a dry run on the CPU
	$(BIN)/python benchmarks/gpu.py --write docs/speed-gpu.md

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .venv-ecosystem .venv-ecosystem-older .venv-dist dist

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

# timm asks for torchvision, which must be built for the same PyTorch; its optimizers need neither.
.venv-ecosystem/test: pyproject.toml constraints.txt constraints-ecosystem.txt
	$(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--constraint constraints-ecosystem.txt --editable '.[torch,cpu,ecosystem]' hypothesis pytest pytest-timeout
	.venv-ecosystem/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--constraint constraints-ecosystem.txt --no-deps timm
	touch $@

.venv-dist/build: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt build
	touch $@

# Transformers of 2024, which loads its own checkpoints only if PyTorch is told to trust them.
.venv-ecosystem-older/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ecosystem-older
	.venv-ecosystem-older/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--editable '.[torch,cpu]' transformers==4.46.3 accelerate==1.1.1 tensorboard hypothesis pytest pytest-timeout
	touch $@
