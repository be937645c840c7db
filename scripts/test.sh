#!/usr/bin/env bash
# All checks: style, types, the tests of the training environment, then those of LLaVA's environment.
#   scripts/test.sh             everything; makes .venv and .venv-llava on the first run
#   scripts/test.sh --servers   tests/environments/servers alone, with a real vLLM: makes .venv-servers (3 GB, three minutes)
#                               and .venv-llava
#   scripts/test.sh --stacks    tests/environments/stacks alone: lm-eval, lmms-eval and inspect_ai in .venv-stacks; TRL, ms-swift,
#                               LLaMA-Factory and a fork of LLaVA in .venv-trl, .venv-swift, .venv-llamafactory and .venv-forks;
#                               mteb and sentence-transformers' trainer in .venv-embedders; -k test_inspect_ai chooses
#   scripts/test.sh --newest    the tests of the training environment with the newest libraries, in .venv-newest: what broke, and
#                               which versions are newer than those of scripts/environments/locked
#   scripts/test.sh -k cache    passes its arguments to pytest in the training environment and runs nothing else
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. scripts/environments.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
WORKERS=(-n 2 --dist loadfile --no-loadscope-reorder) # one thread each; a file's tests share fixtures; the slow files first

case "${1:-}" in
    --servers)
        llava_environment .venv-llava # trains and exports the models that are served
        listed_environment servers .venv-servers
        extensions_of .venv-llava
        shift
        exec .venv-servers/bin/python -m pytest "${@:-tests/environments/servers}"
        ;;
    --stacks)
        extensions_of .venv-llava
        for name in stacks trl swift llamafactory forks embedders; do
            listed_environment "$name" ".venv-$name"
            case "$name" in
                stacks) tests=tests/environments/stacks/test_logs.py ;;
                forks) tests=tests/environments/stacks/test_forks.py ;;
                embedders) tests=tests/environments/stacks/test_embedders.py ;;
                *) tests=tests/environments/stacks/test_trainers.py ;;
            esac
            ".venv-$name/bin/python" -m pytest "$tests" "${@:2}" || [ $? = 5 ] # -k chooses none of these
        done
        exit
        ;;
    --newest)
        export NEWEST=1
        train_environment .venv-newest train,dev
        quickstart_packages .venv-newest
        extensions_of .venv-newest
        RESULTS=$(mktemp)
        STATUS=0
        .venv-newest/bin/python -m pytest "${WORKERS[@]}" --ignore=tests/install -rfE "${@:2}" | tee "$RESULTS" || STATUS=$?
        echo "== versions that are not those of scripts/environments/locked/training.txt:"
        .venv-newest/bin/python scripts/locked.py --newer
        echo "== what broke with them:"
        sed -nE 's/^(FAILED|ERROR) ([^:]*)::.*/\2/p' "$RESULTS" | sort | uniq -c
        exit "$STATUS"
        ;;
esac
train_environment .venv train,dev
quickstart_packages # before anything runs: tests would find a package that the smoke run has half installed
extensions_of .venv
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
llava_environment .venv-llava &
LLAVA_ENVIRONMENT=$!
FAILED=$(mktemp) # the commands that failed
OTHER_OUTPUT=$(mktemp) # what other_checks prints

# check COMMAND...: goes on if it fails; the script fails at its end.
check() {
    local start=$SECONDS
    "$@" || echo "$*" >>"$FAILED"
    echo "== $((SECONDS - start)) s: $*"
}

# installs COMMAND PACKAGE...: what some tests need, and are skipped without, if it is missing and this is root.
installs() {
    if command -v "$1" >/dev/null; then
        return
    fi
    [ "$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq "${@:2}" >/dev/null
}

if ! installs chromium chromium; then
    echo "note: Chromium is not available; skipping the browser test of the report" >&2
fi
if ! PATH=$PATH:/usr/sbin installs sshd openssh-server || ! installs pdsh pdsh iproute2; then
    echo "note: sshd or pdsh is not available; skipping the tests on two hosts" >&2
fi

# What is mostly start-up, and one process at a time, fills what the workers of pytest leave idle.
other_checks() {
    if find_python_3_10 >/dev/null; then
        pinned_environment .venv-pinned
    fi
    check .venv/bin/pyright
    # LLaVA's own pins: the hook, the towers and every stage in one process (this DeepSpeed has no CPU backend for two ranks)
    if [ -d .venv-pinned ]; then
        extensions_of .venv-pinned
        check .venv-pinned/bin/python -m pytest \
            tests/llava/plug/test_{hook,tower,names,checkpoint_name,provenance,quantized}.py \
            tests/llava/end_to_end/test_stages.py \
            -k "not launcher and not deepspeed and not finetune-2" --durations=5
    else
        echo "note: Python 3.10 is not available; LLaVA's own pins (torch 2.1.2, DeepSpeed 0.12.6) are left out" >&2
    fi
    # a user's first command, in little, through to LLaVA
    check scripts/quickstart.sh --smoke --llava --output quickstart-output/test
    # every install command of README and docs, in empty environments, and LLaVA's pins
    check .venv/bin/python -m pytest tests/install --durations=5
}
stop_jobs() {
    local job
    for job in $(jobs -p); do
        pkill -P "$job" || true
        kill "$job" || true
    done 2>/dev/null
}
export LLM2CLIP_FILE_SECONDS=$(mktemp) # conftest.py: how long each test file took
other_checks >"$OTHER_OUTPUT" 2>&1 &
OTHER_ID=$!
trap stop_jobs EXIT

check .venv/bin/ruff check .
check .venv/bin/ruff format --check .
check .venv/bin/python scripts/plain.py
check .venv/bin/python -m pytest "${WORKERS[@]}" --ignore=tests/llava --ignore=tests/install --durations=15
check .venv/bin/python -m pytest "${WORKERS[@]}" tests/llava --durations=15 # LLaVA on today's libraries: those marked both_stacks
# LLaVA's environment: LLaVA itself, then what else is promised there (import, evaluate, score, compare).
check wait "$LLAVA_ENVIRONMENT"
extensions_of .venv-llava
check .venv-llava/bin/python -m pytest "${WORKERS[@]}" tests/llava --durations=15
# apart, as LLaVA disables torch's weight initialization; simulations of the statistics and the browser run once, above
check .venv-llava/bin/python -m pytest "${WORKERS[@]}" tests/vision tests/evaluator \
    --ignore=tests/evaluator/test_statistics.py --ignore=tests/evaluator/test_page.py
check wait "$OTHER_ID"
cat "$OTHER_OUTPUT"
echo "== the ten slowest test files, seconds:"
sort -rn "$LLM2CLIP_FILE_SECONDS" | sed -n 1,10p

if [ -s "$FAILED" ]; then
    sed 's/^/failed: /' "$FAILED" >&2
    exit 1
fi
