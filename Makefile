# make demo | make test | make lab: each does everything from a bare checkout; a second call is quick.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
ANOMALIB = $(shell sed -n 's/^no_deps_requirements = //p' settings.ini)
WORKERS ?= 2
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts

# Workers share the cores; each of them computes on one
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow parity bench lab lint pictures clean

demo: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/ad demo

test: $(VENV)/.installed-dev
	env -u AD_PATHS_DATASETS $(BIN)/nbdev_test --n_workers $(WORKERS)
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadgroup

test-slow: $(VENV)/.installed-dev
	env -u AD_PATHS_DATASETS $(BIN)/nbdev_test --n_workers $(WORKERS) --flags slow
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadgroup --slow

# Real Anomalib beside ours, in a second environment that is made on the first call; writes
# docs/parity.md. make parity MODELS=padim,stfpm for some
parity: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/python -m tests.parity.report $(MODELS)

# Time and memory beside real Anomalib; writes docs/benchmarks.md. make bench BENCH=padim,coreset
bench: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/python -m tests.bench.report $(BENCH)

lab: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

# Fresh outputs for the two notebooks that keep their pictures, and the README's picture
pictures: $(VENV)/.installed-dev
	$(BIN)/python docs/make_pictures.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check nbs tests experiments docs setup.py
	$(BIN)/ruff format --check tests experiments docs setup.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# PyTorch first, so that nothing else chooses its version; Anomalib without its dependencies, so
# without Lightning (of which pip would complain: --no-warn-conflicts)
$(VENV)/.installed: settings.ini setup.py Makefile | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) --no-deps $(ANOMALIB)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev,winclip,tensorboard]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache
