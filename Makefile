# `make run` and `make test` need nothing but Python 3.11 or newer, a shell and the package index.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: run test test-long test-oldest test-ecosystem bench lint types clean

run: .venv/run  ## the main job: one network under every strategy
	$(BIN)/tamegrad compare

test: .venv/test
	$(BIN)/python -m pytest

test-long: .venv/test  ## the property tests with 20,000 examples a backend; one test takes minutes
	$(BIN)/python -m pytest tests/contract/test_properties.py --hypothesis-profile=long --timeout=1800

test-oldest: .venv-oldest/test  ## everything with the oldest versions that pyproject.toml allows; downloads gigabytes
	.venv-oldest/bin/python -m pytest

test-ecosystem: .venv-ecosystem/test .venv-ecosystem-older/test  ## with other libraries, minutes; downloads gigabytes
	.venv-ecosystem/bin/python -m pytest tests/ecosystem
	TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 .venv-ecosystem-older/bin/python -m pytest \
		tests/ecosystem/test_transformers_trainer.py

bench: .venv/bench  ## tamegrad's speed beside other tools', about eight minutes; refuses if the contract suite is red
	$(BIN)/python benchmarks/speed.py --write docs/speed.md

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-oldest .venv-ecosystem .venv-ecosystem-older

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

# Transformers of 2024, which loads its own checkpoints only if PyTorch is told to trust them.
.venv-ecosystem-older/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ecosystem-older
	.venv-ecosystem-older/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt \
		--editable '.[torch,cpu]' transformers==4.46.3 accelerate==1.1.1 tensorboard hypothesis pytest pytest-timeout
	touch $@
