#!/usr/bin/env bash
# The complete pipeline on real data: an LLM teaches a vision tower on the built-in emoji set, and a small LLaVA is trained
# with the tower. Ten minutes and more on two cores; the first result is what fine-tuning taught the LLM.
#
#   scripts/quickstart.sh                   tables, and towers in quickstart-output/default; there, headline.json: what was shown,
#                                           with interval and chance, and what was not; found.html: pictures that a tower finds
#   scripts/quickstart.sh --smoke           a few steps on a few images, to check that everything works (under five minutes)
#   scripts/quickstart.sh --seeds 3         seeds 0 to 2, each with its own adapter and towers; the headline by seed
#   scripts/quickstart.sh --preset long     98 pixels instead of 56, better towers, and LLaVA with SmolLM2: about 40 minutes
#   scripts/quickstart.sh --controls        two more towers a seed, against the raw LLM as it comes (mean pooling, no prompt) and
#                                           against random embeddings of the same captions; LLaVA with the tower of random, and of raw
#   scripts/quickstart.sh --no-llava        stop before LLaVA (the default of --smoke; --llava to run it there)
#   scripts/quickstart.sh --llava-llm smollm2   LLaVA with SmolLM2-135M-Instruct, which also answers in words, in place of a language
#                                           model of 2.5 million weights (tiny): a quarter of an hour more; the default on a GPU
#
# One environment is made for all of it, .venv; LLaVA's unmodified code runs in it on today's libraries. LLAVA_PYTHON=/path/to/python:
# LLaVA in another one. Everything is written to quickstart-output/ (or --output DIR). Rerun the same command to resume.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/options.sh"
PRESET=default SEEDS=1 OUTPUT= SMOKE= CONTROLS= LLAVA= NO_LLAVA= LLAVA_LLM=
read_options "smoke=0 seeds preset controls=0 llava=0 no-llava=0 llava-llm output" "$@"
[ -z "$SMOKE" ] || PRESET=smoke
[ -z "$OUTPUT" ] || OUTPUT=$(realpath -ms "$OUTPUT")
cd "$ROOT"
. scripts/environments.sh
WORK=${OUTPUT:-quickstart-output}

# what a preset decides: pixels, part of the built-in set, steps and pairs a step of stage 1, steps of heads and tower
case "$PRESET" in
    default) SIZE=56 SUBSET="" TUNE_STEPS=12 TUNE_BATCH=64 HEAD_STEPS=100 STEPS=50 FREEZE=0 ;;
    long) SIZE=98 SUBSET="" TUNE_STEPS=20 TUNE_BATCH=64 HEAD_STEPS=100 STEPS=120 FREEZE=0 ;;
    smoke) SMOKE=yes SIZE=56 SUBSET="--concepts 150 30 60 --languages zh ar" TUNE_STEPS=4 TUNE_BATCH=32 HEAD_STEPS=50 STEPS=4 FREEZE=6 ;;
    *) fail "unknown --preset $PRESET; known: default, long, smoke" ;;
esac
[ -z "$LLAVA_LLM" ] || one_of --llava-llm "$LLAVA_LLM" tiny smollm2
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || fail "--seeds $SEEDS is not a number above 0"

quickstart_environment
export PATH="$ROOT/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS="ignore:Cannot enable progress bars" # they last a second each
quickstart_packages

mkdir -p "$WORK"
if command -v flock >/dev/null; then # also held by a background job of a run that has ended
    exec 9>"$WORK/.lock"
    flock -n 9 || fail "another quickstart is running in $WORK; wait until it ends"
fi
say "models"
python scripts/quickstart/inputs.py models --output "$WORK/models" --image-size "$SIZE"
IFS=$'\t' read -r LLM TOWER RANKS DTYPE < <(
    python -c 'import json, sys; print(*json.load(open(sys.argv[1])).values(), sep="\t")' "$WORK/models/models.json")
PRECISION=fp32 CORES=$(env -u OMP_NUM_THREADS nproc)
case "$DTYPE" in bfloat16) PRECISION=bf16 ;; float16) PRECISION=fp16 ;; esac # half precision if it is faster
case "$PRESET-$RANKS" in long-* | default-[1-9]*) LLAVA_LLM=${LLAVA_LLM:-smollm2} ;; esac # where it is trained in minutes, or time is given
LLAVA_LLM=${LLAVA_LLM:-tiny}
if [ "$RANKS" = 0 ]; then # one rank per GPU; two on a CPU with two cores
    export DS_ACCELERATOR=cpu
    RANKS=$((CORES > 1 ? 2 : 1))
fi
while ((128 % RANKS || TUNE_BATCH % RANKS)); do RANKS=$((RANKS - 1)); done # both batches must be divisible by the ranks
OUT=$WORK/$PRESET DATA=$WORK/data LAYER=16 # that the raw LLM is read at
[ -z "$SUBSET" ] || DATA=$WORK/data-$PRESET
mkdir -p "$OUT"

launch() { # launch SCRIPT...: under the launcher, one rank per GPU or core
    OMP_NUM_THREADS=1 deepspeed --quiet --num_gpus "$RANKS" --master_port "$(
        python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')" "$@"
}

say "data"
# shellcheck disable=SC2086 # options on purpose
python scripts/quickstart/inputs.py data --output "$DATA" $SUBSET
llm2clip data check "$DATA/all" >"$DATA/check.txt"
head -5 "$DATA/check.txt"

. scripts/quickstart/parts.sh

# The first result is printed minutes before there is a tower: what fine-tuning taught the LLM.
if [ ! -d "$OUT/towers/tuned-seed0" ]; then
    tune 0
    [ -n "$SMOKE" ] || say "first result, above: how often the LLM puts the keywords of an unseen emoji first, given its name"
    half=$(((CORES + 1) / 2)) # two at once, each with half of the cores: more threads hardly speed up one
    OMP_NUM_THREADS=$half embed raw >"$OUT/embed-raw.log" 2>&1 & other=$!
    trap 'pkill -P "$other"; kill "$other" 2>/dev/null || true' EXIT
    OMP_NUM_THREADS=$half embed tuned-seed0
    wait "$other" || { cat "$OUT/embed-raw.log" >&2; exit 1; }
    trap - EXIT
    say "the teachers on unseen emoji, caption to caption"
    python scripts/quickstart/claims.py --teachers --data "$DATA"
fi

for seed in $(seq 0 $((SEEDS - 1))); do
    if [ "$seed" != 0 ] && [ ! -d "$OUT/towers/tuned-seed$seed" ]; then
        tune "$seed"
        embed "tuned-seed$seed"
    fi
    [ "$seed" != 0 ] || control
    towers "$seed"
    [ -z "$CONTROLS" ] || controls "$seed"
done

say "report"
python scripts/quickstart/claims.py --data "$DATA" --output "$OUT" ${SMOKE:+--must-learn}
if [[ -z $NO_LLAVA && (-z $SMOKE || -n $LLAVA) ]]; then
    say "LLaVA 1.5 in miniature, with the tower before and after stage 2"
    llava=llava options=(--llm "$LLAVA_LLM" --seeds "$SEEDS" ${SMOKE:+--smoke})
    if [ "$LLAVA_LLM" = smollm2 ]; then llava=llava-smollm2 options+=(--teacher "$LLM" --adapter "$DATA/llm/seed0/adapter"); fi
    miniature() { # miniature BEFORE AFTER FOLDER [OPTION...]
        env -u TORCH_EXTENSIONS_DIR scripts/quickstart/miniature.sh --before "$1" --after "$2" --output "$OUT/$3" \
            "${options[@]}" "${@:4}"
    }
    miniature "$TOWER" "$OUT/towers/tuned-seed{seed}" "$llava"
    if [ -n "$CONTROLS" ]; then
        say "LLaVA with the towers of the controls, random and raw, each compared with ours"
        mkdir -p "$OUT/$llava-controls"
        [ -d "$OUT/$llava-controls/llm" ] || ln -sfn "../$llava"/{data,llm,words} "$OUT/$llava-controls" # which knows words
        miniature "$OUT/towers/"{random,raw}"-seed{seed}" "$llava-controls" --names random raw
        for control in random:before raw:after; do
            llm2clip compare "$OUT/$llava-controls/scores/${control#*:}" "$OUT/$llava/scores/after" \
                --names "${control%:*}" tuned --output "$OUT/$llava-${control%:*}/compare" --no-references
        done
    fi
fi
if [[ -z $SMOKE && ! $OUT/found.html -nt $OUT/towers/tuned-seed0 ]]; then
    say "what the tower finds, as a page"
    llm2clip search "$OUT/towers/tuned-seed0" "$DATA/all/test-noto.tar" "a sleeping cat" "ein lachendes Gesicht" 火车 \
        "une pomme rouge" "летящая птица" --llm "$LLM" --adapter "$DATA/llm/seed0/adapter" --cache "$OUT/search" \
        --output "$OUT/found.html" >"$OUT/found.txt"
fi
say "headline"
python -c 'import json, sys; print(json.load(open(sys.argv[1]))["table"])' "$OUT/headline.json"
[ -n "$CONTROLS" ] || echo "LLaVA may gain as much from random embeddings (README.md); --controls measures that."
say "done: tower $OUT/towers/tuned-seed0"
[ -n "$SMOKE" ] || echo "What it finds, with pictures: $OUT/found.html" >&2
echo "In Python: llm2clip_plugin.load_tower(\"$OUT/towers/tuned-seed0\")" >&2
