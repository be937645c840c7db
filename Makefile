# Shortcuts for development; CONTRIBUTING.md explains when to use which.
.PHONY: setup check format test quick llava gpu mutations quickstart clean
TEST_ENV = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

setup: ## make .venv (training) and .venv-llava, install the pre-commit hooks
	bash -c 'ROOT=$$PWD; . scripts/environments.sh; train_environment .venv train,dev; llava_environment .venv-llava'
	.venv/bin/pre-commit install

check: ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: ## fix style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

quick: ## seconds: structure, commands, contracts
	.venv/bin/python -m pytest -q tests/foundation

test: ## everything, as CI runs it
	scripts/test.sh

llava: ## LLaVA's environment alone
	TORCH_EXTENSIONS_DIR=.venv-llava/torch-extensions $(TEST_ENV) .venv-llava/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/llava

gpu: ## tests and benchmarks on a GPU, in ten minutes
	scripts/check_gpu.sh

mutations: ## planted bugs: each must fail its test (not part of CI)
	$(TEST_ENV) .venv/bin/python tests/mutations/run.py

quickstart: ## the whole method in miniature, small
	scripts/quickstart.sh --smoke

clean: ## remove caches and the output of test runs, keep the environments
	rm -rf .pytest_cache .ruff_cache build dist quickstart-output
