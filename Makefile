# `make help` lists the targets. The environment in .venv is made on first use and again when pyproject.toml changes.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# uv reads no pip configuration; a folder of wheels that pip knows is handed on.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env demo test test-extras check bench bench-model bench-data gpu-report format clean
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

# Optional packages lie beside the environment, whose own packages are the demo's corpus.
EXTRAS := PYTHONPATH=$(abspath $(VENV))/extras
$(VENV)/extras: $(VENV)/.installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps peft==0.21.2 torchao==0.18.0 \
		gigatoken==0.10.0 awkward==2.14.0 awkward-cpp==57 importlib-metadata==10.2.0 lazy-importer==0.1.0 zipp==4.1.2 \
		rensa==0.5.0
	touch $@

test-extras: $(VENV)/extras ## what needs peft, torchao, gigatoken or rensa
	$(EXTRAS) $(BIN)/python -m pytest tests/test_uses.py -k "lora or quantization" -q
	$(EXTRAS) $(BIN)/python -m pytest tests/test_data_tokenization.py tests/test_preparation.py -q

bench: env ## can one machine hold the full size? half an hour on 2 cores, wants 20 GB
	$(BIN)/python bench/full_size.py

bench-model: env ## speed and memory beside transformers' T5Gemma 2; 25 minutes on 2 cores
	$(BIN)/python bench/model.py

bench-data: $(VENV)/extras ## the data engine beside tokenizers and T5's; 10 minutes, and 3 GB for T5's TensorFlow
	test -x .venv-t5/bin/t5 || ($(BIN)/uv venv -q --clear .venv-t5 \
		&& $(BIN)/uv pip install -q --python .venv-t5/bin/python t5 seqio tensorflow-cpu && ln -s python .venv-t5/bin/t5)
	$(EXTRAS) $(BIN)/python bench/data.py --t5 .venv-t5/bin/python

gpu-report: env ## correctness, speed and memory of the 0.6B pair on one CUDA GPU
	$(BIN)/python bench/gpu_report.py

format: env ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what runs and tools left behind; the environment stays
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
