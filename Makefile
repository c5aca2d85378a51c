# Everything here sets up what it needs by itself, and only once: see `make help`.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

# The first that runs; on 3.11 most was tried.
PYTHON ?= $(firstword $(shell for version in 3.11 3.12 3.13 3.10; do \
	if python$$version -c "" 2>/dev/null; then echo python$$version; fi; done; true) python3.11)
VENV ?= .venv
OPENMMLAB ?= auto
WORK_DIRS ?= work_dirs
JOBS ?= 2
PORT ?= 8080
CONFIG ?=
CHECKPOINT ?=
BASE ?= HEAD
ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
ENVIRONMENT := $(STAMPS)/environment-$(OPENMMLAB)
MMVSSM := $(STAMPS)/mmvssm
WEB := build/web
ONNXRUNTIME_WEB := $(WEB)/site/onnxruntime-web/version.txt

# `env` with the variables that a run on this machine needs (none on most).
RUN = env $$($(BIN)/python tools/install/environment.py --print-run-env) $(BIN)/python

.PHONY: help setup setup-pretrain setup-web train train-seg train-pruned train-seg-pruned web test test-all test-fast test-changed lint docs clean

help: ## Show this list.
	@echo "Targets (each sets up $(VENV) by itself when it is missing or out of date):"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		awk -F '|' '{ printf "%-22s %s\n", $$1, $$2 }'
	@echo "Variables:"
	@echo "  PYTHON=python3.12   the interpreter that $(VENV) is made with, 3.10 to 3.13 (here: $(PYTHON))"
	@echo "  VENV=.venv          the environment; one that exists is used, and what it has stays as it is"
	@echo "  OPENMMLAB=auto      openmmlab (upstream), onedl (the forks), or what is already installed"
	@echo "  JOBS=2              tests that run at a time, each on a core of its own"
	@echo "  ARGS='...'          further arguments of tools/train.py (--resume continues a run), or of pytest"
	@echo "  BASE=HEAD           the commit that make test-changed compares the working tree with"
	@echo "  WORK_DIRS=work_dirs where the trainings write; none writes over an earlier one"
	@echo "  CONFIG=... CHECKPOINT=...  a model of yours for the web page, in place of the demo models"
	@echo "  PORT=8080           where the web page is served"

# --- set-up ------------------------------------------------------------------------------------------

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "[set-up] $(PYTHON) was not found: install a Python from 3.10 to 3.13 (with its venv" \
			"module), or name one with make PYTHON=/path/to/python ..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "[set-up] $(PYTHON) is too old: name a Python from 3.10 to 3.13 with" \
			"make PYTHON=/path/to/python ..."; exit 1; }
	@echo "[set-up] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "[set-up] $(PYTHON) cannot create environments: install its venv module (on Debian and" \
			"Ubuntu the package $(notdir $(PYTHON))-venv)."; exit 1; }

$(ENVIRONMENT): tools/install/environment.py $(wildcard requirements/*.txt) | $(BIN)/python
	@$(BIN)/python tools/install/environment.py --openmmlab $(OPENMMLAB)
	@mkdir -p $(STAMPS) && touch $@

$(MMVSSM): setup.py pyproject.toml mmvssm/version.py $(wildcard mmvssm/ops/csrc/* mmvssm/ops/*/csrc/*) | $(ENVIRONMENT)
	@echo "[set-up] mmvssm: installing from this folder, with its CPU kernel compiled if a compiler is there"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@test -e mmvssm/ops/_kernels.so || echo "[set-up] the CPU kernel was not compiled (is there a" \
		"C++ compiler?): everything works, but scans are slower on a CPU. '$(BIN)/pip install -v" \
		"--no-build-isolation --no-deps -e .' shows why."
	@mkdir -p $(STAMPS) && touch $@

setup: ## Set up the environment and nothing else, looking again at all that is installed.
	@rm -rf $(STAMPS)
	@$(MAKE) --no-print-directory $(MMVSSM)

$(ONNXRUNTIME_WEB): tools/install/onnxruntime_web.py | $(BIN)/python
	@$(BIN)/python $< $(@D)
	@touch $@

# What tests/support/browser.py looks for, too.
BROWSERS := chromium chromium-browser google-chrome

setup-web: $(ONNXRUNTIME_WEB) ## Fetch onnxruntime-web and, for its test, Chromium (that only as root on Debian).
	@for browser in $(BROWSERS); do command -v $$browser >/dev/null && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "[set-up] Chromium: installing it with apt-get (some hundred MB)"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
		echo "[set-up] Chromium is not here, so the tests of the web page will be skipped: install it (on Debian" \
			"the package chromium), or run make setup-web as root on Debian"; exit 1; \
	fi

# What pre-training needs goes into $(VENV) where torchvision loads there, else with a matching pair of torch and
# torchvision into an environment of its own.
PRETRAIN_VENV ?= $(VENV)-pretrain

setup-pretrain: $(ENVIRONMENT) $(MMVSSM) ## Add mmpretrain and timm, for pre-training (configs/*_imagenet.py, *_cifar10.py).
	@$(BIN)/python tools/install/pretraining.py || { status=$$?; \
		[ $$status -eq 3 ] && [ "$(VENV)" != "$(PRETRAIN_VENV)" ] || exit $$status; \
		echo "[set-up] so pre-training gets an environment of its own, $(PRETRAIN_VENV)"; \
		$(MAKE) --no-print-directory VENV=$(PRETRAIN_VENV) $(PRETRAIN_VENV)/bin/python && \
		$(PRETRAIN_VENV)/bin/python tools/install/pretraining.py --pair && \
		$(MAKE) --no-print-directory VENV=$(PRETRAIN_VENV) PRETRAIN_VENV=$(PRETRAIN_VENV) setup-pretrain; }

# --- the main job ------------------------------------------------------------------------------------

# $(call demo,CONFIG): train, then test the best checkpoint (the last one where none is marked best)
# with pictures of its predictions, by the config in the work dir, which has what ARGS changed.
define demo
	@$(RUN) tools/train.py configs/$(1).py --work-dir $(WORK_DIRS)/$(1) $(ARGS)
	@work=$(WORK_DIRS)/$(1); \
	checkpoint=$$(ls -t $$work/best_*.pth 2>/dev/null | head -n 1); \
	checkpoint=$${checkpoint:-$$(cat $$work/last_checkpoint)} && \
	$(RUN) tools/test.py $$work/$(1).py $$checkpoint --work-dir $$work/test \
		--show-dir $(abspath $(WORK_DIRS)/$(1))/pictures && \
	printf '\n%s\n%s\n%s\n' "Checkpoint: $$checkpoint" "Pictures:   $$work/pictures" \
		"Results:    $$work/test (the metrics of the test), $$work (the log of the training)"
endef

train: $(ENVIRONMENT) $(MMVSSM) ## Train and test GroupMamba Mask R-CNN on the generated shapes.
	$(call demo,groupmamba_maskrcnn_shapes)

train-seg: $(ENVIRONMENT) $(MMVSSM) ## The same for GroupMamba UperNet (semantic segmentation).
	$(call demo,groupmamba_upernet_shapes)

train-pruned: $(ENVIRONMENT) $(MMVSSM) ## Mask R-CNN with a PlainMamba that prunes three quarters of its tokens.
	$(call demo,plainmamba_pruned_maskrcnn_shapes)

train-seg-pruned: $(ENVIRONMENT) $(MMVSSM) ## The same for UperNet.
	$(call demo,plainmamba_pruned_upernet_shapes)

web: $(ENVIRONMENT) $(MMVSSM) $(ONNXRUNTIME_WEB) ## Show the demo models, or CONFIG with CHECKPOINT, in a web page on this machine.
	@$(BIN)/python tools/check_port.py $(PORT)
	@if [ -z "$(CONFIG)$(CHECKPOINT)" ] && ! cat $(WORK_DIRS)/*_shapes/last_checkpoint >/dev/null 2>&1; then \
		echo "[web] no demo model is there yet: training one first with make train-seg, which takes about 8" \
			"minutes on 2 cores"; \
		$(MAKE) --no-print-directory train-seg ARGS=; \
	fi
	@$(RUN) tools/web.py $(CONFIG) $(CHECKPOINT) --work-dirs $(WORK_DIRS) --out $(WEB) --port $(PORT) $(ARGS)

# --- checks ------------------------------------------------------------------------------------------

# JOBS tests run at a time, each on one core; a process that is done takes tests from the others.
PYTEST = env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: $(ENVIRONMENT) $(MMVSSM) ## Run the tests, but those of test-all; those for a GPU are skipped without one.
	@$(BIN)/python tools/install/environment.py --print-versions
	@$(PYTEST) -m "not nightly" $(ARGS)

test-all: $(ENVIRONMENT) $(MMVSSM) ## Run also what shows in more cases, and longer, what test shows in one.
	@$(BIN)/python tools/install/environment.py --print-versions
	@$(PYTEST) $(ARGS)

test-fast: $(ENVIRONMENT) $(MMVSSM) ## Run the quick tests of operators, models, pruning, data, configs and documentation.
	@$(BIN)/python tools/install/environment.py --print-versions
	@$(PYTEST) -m "not slow and not nightly" tests/core $(ARGS)

test-changed: $(ENVIRONMENT) $(MMVSSM) ## Run the test files that import or name what differs from the commit BASE.
	@files=$$($(BIN)/python tools/analysis_tools/changed_tests.py $(BASE)) || exit; \
	if [ -n "$$files" ]; then echo "$$files"; $(PYTEST) $$files $(ARGS); else \
		echo "No test imports or names what differs from $(BASE)."; fi

lint: $(ENVIRONMENT) ## Check style and format.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

docs: $(ENVIRONMENT) ## Build the pages of docs as a web site in build/docs; warnings are errors.
	@$(BIN)/python -c "import mkdocs, material" 2>/dev/null || \
		$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/docs.txt
	@$(BIN)/python -m mkdocs build --strict

clean: ## Remove what builds and tests left behind (not the environment, data or work_dirs).
	rm -rf build dist *.egg-info mmvssm/ops/_kernels.so .pytest_cache .ruff_cache .hypothesis $(MMVSSM)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
