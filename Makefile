# `make help` lists the targets. The environment in .venv is made on first use and again when pyproject.toml changes.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# uv reads no pip configuration; a folder of wheels that pip knows is handed on.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env demo test check bench gpu-report format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.installed ## make the environment (.venv) with the tested package versions

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: env ## the whole road on real text, about 8 minutes on 2 cores: runs/demo/report.html
	$(BIN)/qwen3-encdec demo $(DEMO)

test: env ## every test that needs neither network nor GPU
	$(BIN)/python -m pytest tests/ -v

check: env ## what CI runs: lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/ -q

bench: env ## full size and side by side with T5Gemma 2; an hour on 2 cores, wants 20 GB
	$(BIN)/python bench/full_size.py
	$(BIN)/python bench/model.py

gpu-report: env ## correctness, speed and memory of the 0.6B pair on one CUDA GPU
	$(BIN)/python bench/gpu_report.py

format: env ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what runs and tools left behind; the environment stays
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
