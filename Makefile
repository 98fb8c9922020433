# `make help` lists what there is. Every target but doctor and clean makes .venv first where there is none;
# PYTHON=... chooses with which.
.DEFAULT_GOAL := help
.PHONY: help doctor demo reproduce test test-gpu lab lint format lock reference kernels readme clean env
SHELL := /bin/sh
BIN := .venv/bin
KERNELS = --outputs outputs/reference/$(or $(MACHINE),h200) --tokens 1 4 8 16 32 64 --repeats 10

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

doctor:  ## say what this machine has, what will run on it, and how to get the rest; installs nothing
	@$(or $(wildcard $(BIN)/python),$(PYTHON),python3) -m flexq_core doctor --data-dir "$(DATA_DIR)"

demo: env  ## run the notebooks on the demo models and build outputs/report.html
	@$(BIN)/python -m flexq_core.workbook demo </dev/null

reproduce: env  ## run every notebook on any model: make reproduce MODEL=llama-2-7b [DATA_DIR=folder]
	@$(BIN)/python -m flexq_core.workbook reproduce "$(or $(MODEL),$(error MODEL is not set: make reproduce MODEL=llama-2-7b))" --data-dir "$(DATA_DIR)" </dev/null

test: env  ## run the tests
	@$(BIN)/python -m pytest -q

test-gpu: env  ## run the tests that want an NVIDIA GPU, on it
	@$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('no CUDA GPU, or a torch without CUDA (env/README.md)')"
	@$(BIN)/python -m pytest -q -m gpu

lab: env  ## open the notebooks in JupyterLab
	@$(BIN)/python -m jupyterlab notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

lint: env  ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: env  ## mend style, and strip outputs from the notebooks
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .
	@$(BIN)/nbstripout notebooks/*.ipynb

env:  ## make or update .venv from env/requirements.lock
	@PYTHON="$(PYTHON)" env/setup

lock: env  ## resolve env/requirements.in into env/requirements.lock
	@env/lock

reference: env  ## keep this machine's records in outputs/reference/$(MACHINE)/ (cpu unless set)
	@$(BIN)/python -m flexq_core.workbook reference $(or $(MACHINE),cpu)

kernels: env  ## time the paper's shapes on this machine's GPU into outputs/reference/$(MACHINE)/ (h200 unless set)
	@$(BIN)/python -m flexq_core.studies.kernels $(KERNELS) --shapes paper
	@$(BIN)/python -m flexq_core.studies.kernels $(KERNELS) --shapes paper-a8 --activation-bits 8

readme: env  ## make the README's results table from outputs/reference/
	@$(BIN)/python -m flexq_core.workbook readme

clean:  ## delete .venv, caches and all outputs but outputs/reference/
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@find outputs -mindepth 1 -maxdepth 1 ! -name README.md ! -name reference -exec rm -rf {} +
