# Everything a newcomer needs; each target sets up .venv by itself (scripts/setup.sh) and reuses it afterwards.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# The launcher, ruff and mpirun are found in .venv; compiled extensions stay inside the repository.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export PYTHONUNBUFFERED := 1
unexport PYTHONDONTWRITEBYTECODE  # else each of some hundred processes compiles all modules again

# A process per core, each with one thread.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} python -m pytest -n logical --maxprocesses 4 --dist worksteal

# Tests whose numbers come from the processor's kernels: run a second time with those that every processor has.
NUMERIC := tests/model $(addprefix tests/pipeline/,engine checkpoint data tasks training weights)

.PHONY: help setup demo demo-evlgen test extended unit lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## create or refresh .venv (all other targets do this first)
	@scripts/setup.sh

demo: setup ## make data, train a small model with DeepSpeed, caption held-out images, write the report (ARGS=--help)
	@python scripts/demo.py $(ARGS)

demo-evlgen: setup ## the same with a frozen language model: weights, connector, captions, what was merged (ARGS=--help)
	@python scripts/demo_evlgen.py $(ARGS)

test: lint ## lint, then all tests, slow ones last, then the fast numeric ones with the plainest kernels (not with ARGS)
	@scripts/setup.sh --test-tools
	@$(PYTEST) -m "not extended" $(ARGS)
	@$(if $(strip $(ARGS)),:,ATEN_CPU_CAPABILITY=default $(PYTEST) -m "not slow" $(NUMERIC))

extended: setup ## the long tests that make test leaves out: whole pipelines, disturbed trainings in a real Slurm
	@scripts/setup.sh --test-tools
	@$(PYTEST) -m extended $(ARGS)

unit: setup ## only the fast tests
	@$(PYTEST) -m "not slow" $(ARGS)

lint: setup ## ruff: rules and format
	@ruff check .
	@ruff format --check --quiet .

format: setup ## ruff: fix what it can
	@ruff check --fix .
	@ruff format .

clean: ## remove .venv and every cache; data/ and runs/ stay
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
