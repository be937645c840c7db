#!/usr/bin/env bash
# What this package does on this GPU, in one command of at most ten minutes: the tests marked gpu, then the benchmarks.
# Prints a Markdown table at its end, to be pasted into an issue or a pull request.
#   scripts/check_gpu.sh            on one GPU, environments made before (make setup)
#   scripts/check_gpu.sh --tiny     the same with tiny sizes: a minute or two on a CPU
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. scripts/environments.sh
train_environment .venv train,dev
extensions_of .venv
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python scripts/check_gpu.py "$@"
