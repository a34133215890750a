# Everything a newcomer types: make setup, make quickstart, make test.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.megafab-setup
TORCH := torch==2.13.0
SLURM := slurmctld slurmd slurm-client munge
# Another source of torch, such as an index of CPU builds: make setup PIP_TORCH_ARGS="--index-url URL"
PIP_TORCH_ARGS ?=
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null \
	&& { echo $$python; break; }; done)
# More overrides for the quickstart's training, such as ARGS="train.steps=500"; ENGINE=deepspeed for ZeRO.
ARGS ?=
ENGINE ?= megatron
QUICKSTART := runs/quickstart$(if $(filter-out megatron,$(ENGINE)),_$(ENGINE))

.PHONY: help setup slurm quickstart kernels test test-all lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s $$'\t'

setup: $(STAMP) ## Make .venv with everything in it (about a minute; instant when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "megafab needs Python 3.11 or 3.12 on PATH (or: make setup PYTHON=/path/to/python)" >&2; exit 1; }
	@echo "== setup: $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== setup: $(TORCH)"
	@$(BIN)/python -m pip install --quiet $(PIP_TORCH_ARGS) "$(TORCH)"
	@echo "== setup: megafab and its dependencies, at the versions of constraints.txt"
	@$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)" -e ".[dev,data]"
	@touch $@

slurm: ## Install what the tests of Slurm start on this machine, where apt and root allow (20 MB)
	@if command -v slurmctld slurmd munged srun >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "== slurm: apt-get install $(SLURM)"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -qq -y --no-install-recommends $(SLURM) >/dev/null || \
		echo "slurm: could not be installed: the tests that need it are skipped" >&2; \
	else \
		echo "slurm: not installed, and not root with apt to install $(SLURM): the tests that need it are skipped" >&2; \
	fi

quickstart: setup ## Make a corpus, train on 4 ranks, generate, report (ENGINE=deepspeed, ARGS="train.steps=500")
	@echo "== 1/4 data: the source of Python's standard library as a corpus in runs/data/python_stdlib"
	$(BIN)/megafab data out=runs/data/python_stdlib tokenizer.vocab=4096
	@echo "== 2/4 train: a small Llama, tensor parallel 2 x pipeline parallel 2, into $(QUICKSTART)"
	$(BIN)/megafab train recipe=quickstart engine=$(ENGINE) run.dir=$(QUICKSTART) $(ARGS)
	@echo "== 3/4 generate: text from its last checkpoint"
	$(BIN)/megafab generate checkpoint=$(QUICKSTART) prompt="def main("
	@echo "== 4/4 report: $(QUICKSTART)/report.html"
	$(BIN)/megafab report $(QUICKSTART)

kernels: setup ## Build the CUDA kernels for this machine's GPU; without one, compile them and show what they take
	$(BIN)/python -m megafab.kernels.build

test: setup slurm ## Tests that need neither a GPU nor much time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup slurm ## Every test this machine can run
	@marks=$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")'); \
	set -x; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$$marks"

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup ## Let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and builds; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
