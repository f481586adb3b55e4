# Every target makes what it needs by itself: Python 3.11, make and the package registries are enough.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export PYTHON

.PHONY: help install demo demo-model schemas lint test torture clean
.PHONY: bench bench-trainer bench-trainer-cuda bench-gateway bench-join bench-snapshot

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

install: $(INSTALLED) ## .venv with everything, exactly pinned

$(INSTALLED): deploy/requirements.lock deploy/install.sh pyproject.toml
	@deploy/install.sh python

demo: $(INSTALLED) ## the whole loop on one worked example, before and after
	@$(BIN)/python -m deploy.demo.run

demo-model: $(INSTALLED) ## train the demo's base model again
	@$(BIN)/python -m deploy.demo.train_base

schemas: $(INSTALLED) ## JSON Schemas of the events, into deploy/schemas/
	@$(BIN)/python -m loop.schemas

lint: $(INSTALLED) ## ruff and mypy --strict
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test: lint ## lint and every test, the real vLLM included
	@deploy/install.sh debian postgres chromium promtool
	@$(BIN)/pytest -q --durations=15 -n 2 --dist loadscope --no-loadscope-reorder

torture: $(INSTALLED) ## 100 faults against Kafka, Postgres, gateways and joiners; one JSON line
	@deploy/install.sh debian postgres
	@$(BIN)/python -m tests.torture --faults 100 --minutes 20

bench: bench-gateway bench-join bench-snapshot bench-trainer ## every benchmark; JSON lines

bench-gateway: $(INSTALLED) ## what the gateway costs, against direct, nginx, a bare proxy and LiteLLM; how processes scale
	@deploy/install.sh debian nginx
	@$(BIN)/python -m tests.bench.gateway
	@$(BIN)/python -m tests.bench.gateway_processes
	@$(BIN)/python -m tests.bench.gateway_kafka

bench-join: $(INSTALLED) ## joined events a second
	@$(BIN)/python -m tests.bench.join

bench-snapshot: $(INSTALLED) ## rows a second and memory of a night's dataset of a million examples
	@$(BIN)/python -m tests.bench.snapshot

bench-trainer: $(INSTALLED) ## rows a second and memory, against TRL
	@$(BIN)/python -m tests.bench.trainer

bench-trainer-cuda: $(INSTALLED) ## the same on a CUDA machine, with models of 1 B and 8 B parameters
	@$(BIN)/python -m tests.bench.trainer_cuda

clean: ## everything that was made: environment, caches, var/
	rm -rf .venv var build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
