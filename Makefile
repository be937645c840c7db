# Shortcuts for development; CONTRIBUTING.md explains when to use which.
.PHONY: setup quick check format test llava gpu lock mutations quickstart house clean
TEST_ENV = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
PYTEST = $(TEST_ENV) .venv/bin/python -m pytest -q
# tests that start no other process, a few of every room; pytest fails if a path is missing
QUICK = $(addprefix tests/, foundation/test_contracts.py scripts/test_plain.py data/test_sampler.py \
    vision/test_dual.py vision/test_adapter.py train/test_loss.py train/test_loss_terms.py text/test_pairs.py \
    evaluate/test_retrieval.py evaluator/test_statistics.py)
# most of what starts no other process
FAST = $(QUICK) $(addprefix tests/, foundation house scripts/test_house.py data/test_images.py data/test_emoji.py data/test_sources.py \
    data/test_tables.py data/test_tars.py data/test_caption_files.py vision/convert vision/test_towers.py \
    vision/test_eva02.py text/test_encoder.py evaluator/test_compare.py docs/test_fidelity.py)

setup: ## make .venv (training) and .venv-llava, install the pre-commit hooks
	bash -euc 'ROOT=$$PWD; . scripts/environments.sh; train_environment .venv train,dev; llava_environment .venv-llava'
	.venv/bin/pre-commit install

quick: ## under a minute: style, and tests that start no other process
	.venv/bin/ruff check .
	.venv/bin/python scripts/plain.py
	$(PYTEST) -k "not ranks" $(QUICK)

check: ## under three minutes: style, types, and the fast tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	$(PYTEST) -n 2 --dist loadfile -m "not slow" $(FAST)

format: ## fix style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

test: ## everything, as CI runs it
	scripts/test.sh

llava: ## LLaVA's environment alone
	TORCH_EXTENSIONS_DIR=.venv-llava/torch-extensions $(TEST_ENV) .venv-llava/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/llava

gpu: ## tests and benchmarks on a GPU, in ten minutes
	scripts/check_gpu.sh

lock: ## the newest versions into scripts/environments/locked, in which environments are installed
	scripts/lock.sh --upgrade

mutations: ## planted bugs: each must fail its test (not part of CI)
	$(TEST_ENV) .venv/bin/python tests/mutations/run.py

quickstart: ## the whole method in miniature, small
	scripts/quickstart.sh --smoke

house: ## files, lines, functions, arrows of this checkout
	.venv/bin/python scripts/house.py .

clean: ## remove caches and the output of test runs, keep the environments
	rm -rf .pytest_cache .ruff_cache build dist quickstart-output
