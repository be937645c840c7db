#!/usr/bin/env bash
# What this package does on this GPU, in about ten minutes: the tests marked gpu, then the benchmarks, each with a table in
# Markdown to paste into an issue or a pull request. One that fails does not stop the others; exit status 1 if any failed.
#   scripts/check_gpu.sh            on one GPU, environments made before (make setup)
#   scripts/check_gpu.sh --tiny     the same with tiny sizes: a minute or two on a CPU
set -uo pipefail
cd "$(dirname "$0")/.." || exit
ROOT=$PWD
. scripts/environments.sh
case "${1:-}" in
    "")
        LLAVA="--images 64 --dtype float16 --shape l14-336"
        STEP="--batch 128"
        LOSS="--pairs 32768"
        PAIRS="--batch 256 --micro 64"
        OPEN=""
        TRAFFIC=""
        ;;
    --tiny)
        LLAVA="--images 1 --rounds 2 --shape tiny"
        STEP="--towers tiny --batch 4 --rounds 2"
        LOSS="--pairs 256 --rounds 1"
        PAIRS="--batch 8 --micro 4 --rounds 1 --concepts 20"
        OPEN="--tower tiny --batch 4 --steps 2 --rounds 1"
        TRAFFIC="--blocks 2 --stages 1"
        ;;
    *)
        echo "error: unknown option $1; known: --tiny" >&2
        exit 2
        ;;
esac
train_environment .venv train,dev || exit 1
extensions_of .venv
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "${1:-}" != --tiny ] && ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no GPU found (torch.cuda.is_available() is false); --tiny checks the same on a CPU" >&2
    exit 2
fi
GEMMA=quickstart-output/models/gemma-3-270m
failed=0

# run COMMAND...: under a heading; goes on if it fails.
run() {
    printf '\n## %s\n' "$*"
    if ! timeout 900 "$@"; then
        echo "FAILED: $*"
        failed=1
    fi
}

run .venv/bin/python -m pytest -q -m gpu tests --ignore=tests/llava
# shellcheck disable=SC2086 # options on purpose
{
    run .venv/bin/python -m scripts.benchmarks.step $STEP --precision bf16
    run .venv/bin/python -m scripts.benchmarks.step $STEP
    run .venv/bin/python -m scripts.benchmarks.loss $LOSS
    if [ -f "$GEMMA/config.json" ]; then
        run .venv/bin/python -m scripts.benchmarks.sentence_transformers $PAIRS --llm "$GEMMA"
    else
        echo "skipped: scripts.benchmarks.sentence_transformers, which needs $GEMMA; scripts/quickstart.sh --smoke makes it"
    fi
    run .venv/bin/python -m scripts.benchmarks.open_clip $OPEN
    run env OMP_NUM_THREADS=1 .venv/bin/python -m scripts.benchmarks.step_traffic $TRAFFIC
    if [ -x .venv-llava/bin/python ]; then
        run .venv-llava/bin/python -m scripts.benchmarks.llava $LLAVA
    fi
}
exit $failed
