# `make help` lists what there is. Every target but help, doctor and clean makes .venv first where there is none;
# PYTHON=... chooses with which.
.DEFAULT_GOAL := help
.PHONY: help doctor demo reproduce test test-gpu lab lint format lock reference kernels end-to-end readme clean env
SHELL := /bin/sh
BIN := .venv/bin
ON_CARD = --outputs "outputs/reference/$(or $(MACHINE),{card})"
KERNELS = $(BIN)/python -m flexq_core.studies.kernels $(ON_CARD) --repeats 10
END_TO_END = $(BIN)/python -m flexq_core.studies.e2e $(ON_CARD) --weights random --output-tokens 128 256 512 1024
LIBRARIES = torch-fp16 cublas-int8 cublaslt-fp8
DECODE = 1 4 8 16 32 64
PREFILL = 128 256 512 1024 2048 4096 8192
SWEPT = 28672x8192 8192x28672 8192x8192 4096x4096

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

doctor:  ## say what this machine has, what will run on it, and how to get the rest; installs nothing
	@$(or $(wildcard $(BIN)/python),$(PYTHON),python3) -m flexq_core doctor --data-dir "$(DATA_DIR)" || true

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

kernels: env  ## time the paper's shapes on this machine's GPU into outputs/reference/$(MACHINE)/ (the card, such as h100, unless set)
	@$(KERNELS) --shapes paper --tokens $(DECODE) 128 --methods imma wgmma bmma $(LIBRARIES) --combinations usual
	@$(KERNELS) --shapes paper --tokens 256 512 1024 --methods imma wgmma $(LIBRARIES)
	@$(KERNELS) --shapes paper-a8 --tokens $(DECODE) --methods imma wgmma bmma $(LIBRARIES) --activation-bits 8
	@$(KERNELS) --shapes $(SWEPT) --tokens $(DECODE) $(PREFILL) --methods imma wgmma $(LIBRARIES) --activation-bits 6 8
	@$(KERNELS) --shapes 28672x8192 4096x4096 --tokens 1 --methods torchao-int8wo

end-to-end: env  ## time the paper's models with random weights on this machine's GPU, end to end, into the same folder
	@$(END_TO_END) --model llama-13b --methods flexq fp16 w8a8 fp8 smoothquant-w8a8 w8a16 w6a6 w6a8
	@$(END_TO_END) --model llama-2-70b --methods flexq
	@$(END_TO_END) --model llama-13b --methods flexq fp16 --prompt-tokens 1024
	@for model in llama-7b llama-30b opt-30b; do $(END_TO_END) --model $$model --methods flexq fp16 w8a8 || exit 1; done
	@$(END_TO_END) --model llama-13b --methods flexq fp16 w8a8 --batch-size 4 8

readme: env  ## make the README's results tables from outputs/reference/
	@$(BIN)/python -m flexq_core.workbook readme

clean:  ## delete .venv, caches and all outputs but outputs/reference/
	@rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@find outputs -mindepth 1 -maxdepth 1 ! -name README.md ! -name reference -exec rm -rf {} +
