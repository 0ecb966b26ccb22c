# make demo | make test | make lab: each does everything from a bare checkout; a second call is quick.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
DOCS_VENV ?= .venv-docs
DOCS = $(shell sed -n 's/^docs_requirements = //p' settings.ini)
ANOMALIB = $(shell sed -n 's/^no_deps_requirements = //p' settings.ini)
WORKERS ?= 2
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts

# Workers share the cores; each of them computes on one
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow soak browser parity bench verify-mvtec verify-visa verify-btad results lab lint
.PHONY: pictures docs clean

demo: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/ad demo

# All notebooks, then all tests; what they leave in the folder for temporary files goes with them.
# A process keeps what its notebooks made until it ends, 20 GB for all, 11 for the largest third
define temporary_folder
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && export TMPDIR="$$scratch"
endef

define run_tests
	$(call temporary_folder) && \
	for part in '^0' '^[12]' '^[^012]'; do \
	env -u AD_PATHS_DATASETS $(BIN)/nbdev_test --file_re "$$part" --n_workers $(WORKERS) $(1) || \
	exit 1; rm -rf "$$scratch"/*; done && \
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist loadgroup $(2)
endef

test: $(VENV)/.installed-dev browser
	$(call run_tests)

test-slow: $(VENV)/.installed-dev $(DOCS_VENV)/.installed browser
	$(call run_tests,--flags slow,--slow)

# What takes long because it is many: 3,000 bad inputs, 200 kills, 10,000 predictions
soak: $(VENV)/.installed-dev
	$(call temporary_folder) && $(BIN)/python -m pytest tests/phase_06 --slow -n $(WORKERS) \
	-k "killed or bad_input or memory"

# The browser tests drive Chromium: Debian's, installed where that is allowed; without it they skip
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	chromium fonts-dejavu-core >/dev/null; then command -v chromium; else \
	echo "no Chromium, so the browser tests will skip: apt-get install chromium"; fi

# Real Anomalib beside ours, in a second environment that is made on the first call; writes
# docs/parity.md. make parity MODELS=padim,stfpm for some
parity: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/python -m tests.parity.report $(MODELS)

# Time and memory beside real Anomalib; writes docs/benchmarks.md. make bench BENCH=padim,coreset
bench: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/python -m tests.bench.report $(BENCH)

# The field's tables, for a person with the data sets in datasets/ and the weights in backbones/:
# make verify-mvtec MODELS=padim,patchcore SEEDS=0,1,2. All normals are trained on, as papers do.
# About 20 hours on one data-centre GPU (VisA 18, BTAD 4): reckoned from steps, not measured
VERIFIED ?= padim,patchcore,stfpm,efficient_ad,dinomaly
SEEDS ?= 0
verify-mvtec verify-visa verify-btad: verify-%: $(VENV)/.installed
	env -u OMP_NUM_THREADS $(BIN)/ad benchmark models=$(or $(MODELS),$(VERIFIED)) dataset=$* \
	categories=all seeds=$(SEEDS) dataset.held_out=0 trainer.progress=false --against published \
	--report $(WORDS)

# The same path on the small sets that can be passed on; writes docs/results.md
results: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/python -m docs.make_results

lab: $(VENV)/.installed-dev
	env -u OMP_NUM_THREADS $(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

# Fresh outputs for the notebooks that keep their pictures, and the README's pictures
pictures: $(VENV)/.installed-dev browser
	$(BIN)/python -m docs.make_pictures

# README, reports and notebooks as pages: docs/_site/index.html. Once its environment is made, this
# needs no network, and neither do the pages
docs: $(DOCS_VENV)/.installed
	rm -rf docs/_site
	$(DOCS_VENV)/bin/python -m sphinx -q -W --keep-going -c docs -d docs/_site/.doctrees . docs/_site
	rm -rf docs/_site/.doctrees docs/jupyter_execute
	@echo "docs/_site/index.html"

$(DOCS_VENV)/.installed: settings.ini
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS)
	touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check nbs tests experiments docs setup.py anomaly_detection/_install_kit.py
	$(BIN)/ruff format --check tests experiments docs setup.py anomaly_detection/_install_kit.py

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
	$(PIP) --editable '.[dev,winclip,tensorboard,onnx]'
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) docs/_site build *.egg-info .pytest_cache .hypothesis .ruff_cache
