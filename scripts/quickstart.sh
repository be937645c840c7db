#!/usr/bin/env bash
# The complete pipeline on real data: an LLM teaches a vision tower on the built-in emoji set, and a small LLaVA is trained
# with the tower before and after. Ten to fourteen minutes on two cores; at the end, one page shows what came of it.
#
#   scripts/quickstart.sh                   pictures found, and LLaVA's answers: quickstart-output/index.html
#   scripts/quickstart.sh --smoke           a few steps on a few images, to check that everything works (about five minutes)
#   scripts/quickstart.sh --preset table    the settings of README's table: more steps, eleven languages instead of three
#   scripts/quickstart.sh --preset long     98 pixels instead of 56, better towers, and LLaVA with SmolLM2: about 40 minutes
#   scripts/quickstart.sh --seed 1          another training than seed 0
#   scripts/quickstart.sh --no-llava        stop before LLaVA (the default of --smoke; --llava to run it there)
#   scripts/quickstart.sh --llava-llm smollm2   LLaVA with SmolLM2-135M-Instruct, which also answers in words, in place of a language
#                                           model of 2.5 million weights (tiny): a quarter of an hour more; the default of --preset long
#
# Whether the difference is the teacher's is another question, with other runs, whose preset is table unless another is given
# (scripts/claims.sh checks what README.md states):
#
#   scripts/quickstart.sh --compare         also a tower of the original LLM, and one of wrong pictures: tables with intervals
#                                           and p-values; headline.json in quickstart-output/table
#   scripts/quickstart.sh --seeds 3         seeds 0 to 2, each with its own adapter and towers; the tables by seed
#   scripts/quickstart.sh --controls        as --compare, and three more towers a seed: against a linear map on the original LLM,
#                                           fitted to the captions of stage 1; against the original LLM with mean pooling and no prompt;
#                                           against random embeddings of the same captions. LLaVA with the tower of random embeddings,
#                                           and with that of the original LLM
#
# One environment is made for all of it, .venv; LLaVA's unmodified code runs in it on today's libraries. LLAVA_PYTHON=/path/to/python:
# LLaVA in another one. Everything is written to quickstart-output/ (or --output DIR). Rerun the same command to resume.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/options.sh"
PRESET=''
SEED=0
SEEDS=1
OUTPUT=''
SMOKE=''
COMPARE=''
CONTROLS=''
LLAVA=''
NO_LLAVA=''
LLAVA_LLM=''
read_options "smoke=0 seed seeds preset compare=0 controls=0 llava=0 no-llava=0 llava-llm output" "$@"
if [ -n "$SMOKE" ]; then
    PRESET=smoke
fi
if [ -n "$OUTPUT" ]; then
    OUTPUT=$(realpath -ms "$OUTPUT")
fi
cd "$ROOT"
. scripts/environments.sh
. scripts/quickstart/progress.sh
. scripts/quickstart/parts.sh
WORK=${OUTPUT:-quickstart-output}

[[ $SEED =~ ^[0-9]+$ ]] || fail "--seed $SEED is not a number"
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || fail "--seeds $SEEDS is not a number above 0"
if [ "$PRESET" = smoke ]; then
    SMOKE=yes
fi
if [ -n "$CONTROLS" ] || [ -n "$SMOKE" ] || [ "$SEEDS" != 1 ]; then
    COMPARE=yes # a smoke run checks that something was learned
fi
if [ -n "$COMPARE" ] && [ "$SEED" != 0 ]; then
    fail "--seed $SEED is for a single training; comparisons train seeds 0 to N - 1 (--seeds N)"
fi
if [ -z "$PRESET" ]; then
    PRESET=${COMPARE:+table}
    PRESET=${PRESET:-default}
fi

# What a preset decides. PERCENT: about how long it takes, compared with the table's.
SIZE=56       # pixels
SUBSET=''     # options of inputs.py that take a part of the built-in set
TUNE_STEPS=12 # of stage 1
TUNE_BATCH=64 # pairs of one of them
HEAD_STEPS=100
STEPS=50 # of stage 2
FREEZE=0 # first blocks of the tower that are not trained
PERCENT=100
case "$PRESET" in
    default)
        SUBSET="--concepts 1068 100 326 --languages es zh ar --test-kinds short long" # 1068 are all of them
        TUNE_STEPS=8
        TUNE_BATCH=48
        STEPS=40
        FREEZE=4
        PERCENT=50
        ;;
    table) ;;
    long)
        SIZE=98
        TUNE_STEPS=20
        STEPS=120
        PERCENT=350
        ;;
    smoke)
        SUBSET="--concepts 150 30 60 --languages zh ar"
        TUNE_STEPS=4
        TUNE_BATCH=32
        HEAD_STEPS=50
        STEPS=4
        FREEZE=6
        PERCENT=25
        ;;
    *) fail "unknown --preset $PRESET; known: default, table, long, smoke" ;;
esac
if [ -n "$LLAVA_LLM" ]; then
    one_of --llava-llm "$LLAVA_LLM" tiny smollm2
fi
RUN_LLAVA=yes
if [ -n "$NO_LLAVA" ] || [[ -n $SMOKE && -z $LLAVA ]]; then
    RUN_LLAVA=''
fi
OUT=$WORK/$PRESET
DATA=$WORK/data
if [ "$PRESET" != table ]; then
    DATA=$WORK/data-$PRESET
fi
LAYER=16 # that the raw LLM is read at
LOGS=$OUT/logs
mkdir -p "$OUT"
if command -v flock >/dev/null; then # also held by a background job of a run that has ended
    exec 9>"$WORK/.lock"
    flock -n 9 || fail "another quickstart is running in $WORK; wait until it ends"
fi
trap_ends

# What each stage takes on two cores (progress.sh): where the time left starts.
of_preset() { # of_preset SECONDS: of the table's settings
    echo $(($1 * PERCENT / 100))
}
plan "the environment" 20 0
plan "models and pictures" 45 0
plan "stage 1: fine-tuning the LLM on captions" 20 "$(of_preset 200)" 1
plan "embedding the captions with the LLM" 15 "$(of_preset 250)" 2 4 # every caption is in four styles
plan "stage 2: training the tower" 30 "$(of_preset 180)" 1
plan "what the tower finds, before and after" 15 20
if [ -n "$COMPARE" ]; then
    plan "controls: the raw LLM, wrong pictures" $((60 * SEEDS)) "$(of_preset $((600 * SEEDS)))"
fi
if [ -n "$RUN_LLAVA" ]; then
    LLAVA_WORK=$(of_preset 200)
    if [ "$PRESET" = default ]; then # as many steps as the table's, without which LLaVA learns to guess alone
        LLAVA_WORK=200
    fi
    plan "LLaVA 1.5 in small, with the tower before, after" $((50 * SEEDS)) $((LLAVA_WORK * SEEDS)) 2
    plan "LLaVA's answers about unseen pictures" $((25 * SEEDS)) $((20 * SEEDS))
fi
if [[ -n $RUN_LLAVA && -n $CONTROLS ]]; then
    plan "LLaVA with the towers of the controls" $((60 * SEEDS)) "$(of_preset $((220 * SEEDS)))"
fi

environment() {
    quickstart_environment
    export PATH="$ROOT/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    export HF_HUB_DISABLE_PROGRESS_BARS=1 PYTHONWARNINGS="ignore:Cannot enable progress bars" # they last a second each
    quickstart_packages
}

# Building the models keeps one core busy; what LLaVA needs of neither stage is made beside it.
models_and_pictures() {
    local words=''
    if [ -n "$RUN_LLAVA" ] && [ "$LLAVA_LLM" = tiny ]; then
        miniature words "$LLAVA_FOLDER" &
        words=$!
    fi
    # shellcheck disable=SC2086 # options on purpose
    python scripts/quickstart/inputs.py all --models "$WORK/models" --image-size "$SIZE" --output "$DATA" $SUBSET
    llm2clip data check "$DATA/all" >"$DATA/check.txt"
    if [ -n "$words" ]; then
        wait "$words"
    fi
}

# launch SCRIPT...: one rank per GPU or core. Without --, torchrun takes the script's --r as its own.
launch() {
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$RANKS" -- "$@"
}

# The same trainings against other embeddings, and the tables of them.
compare_teachers() {
    local seed
    embed_in_halves raw
    control
    for seed in $(seq 0 $((SEEDS - 1))); do
        if [ ! -d "$OUT/towers/tuned-seed$seed" ]; then
            tune "$seed"
            embed_in_halves "tuned-seed$seed"
        fi
        towers "$seed"
        if [ "$PRESET" != smoke ]; then
            fit_map "$seed"
        fi
        if [ -n "$CONTROLS" ]; then
            controls "$seed"
        fi
    done
    python scripts/quickstart/claims.py --data "$DATA" --output "$OUT" ${SMOKE:+--must-learn} >"$OUT/tables.md"
}

# miniature UNTIL FOLDER [OPTION...]: a small LLaVA with each of two towers, up to a part.
miniature() {
    local options=(--llm "$LLAVA_LLM" --first-seed "$SEED" --seeds "$SEEDS" ${SMOKE:+--smoke})
    if [ "$LLAVA_LLM" = smollm2 ] && [ "$1" != words ]; then
        options+=(--teacher "$LLM" --adapter "$DATA/llm/seed$SEED/adapter")
    fi
    env -u TORCH_EXTENSIONS_DIR scripts/quickstart/miniature.sh --until "$1" --output "$OUT/$2" \
        ${DTYPE:+--dtype "$DTYPE"} "${options[@]}" "${@:3}"
}

# The tower as it comes, and ours.
before_and_after() {
    miniature "$1" "$LLAVA_FOLDER" --before "$TOWER" --after "$OUT/towers/tuned-seed{seed}"
}

# LLaVA with the towers of the controls, random and raw, each compared with ours.
llava_of_controls() {
    local control
    mkdir -p "$OUT/$LLAVA_FOLDER-controls"
    if [ ! -d "$OUT/$LLAVA_FOLDER-controls/llm" ]; then # the same language model, which knows words
        ln -sfn "../$LLAVA_FOLDER"/{data,llm,words} "$OUT/$LLAVA_FOLDER-controls"
    fi
    miniature answers "$LLAVA_FOLDER-controls" --names random raw \
        --before "$OUT/towers/random-seed{seed}" --after "$OUT/towers/raw-seed{seed}"
    for control in random:before raw:after; do
        llm2clip compare "$OUT/$LLAVA_FOLDER-controls/scores/${control#*:}" "$OUT/$LLAVA_FOLDER/scores/after" \
            --names "${control%:*}" tuned --output "$OUT/$LLAVA_FOLDER-${control%:*}/compare" --no-references \
            --image-folder "$OUT/$LLAVA_FOLDER/data/images"
    done
}

find_pictures() {
    python scripts/quickstart/found.py --data "$DATA" --output "$OUT" --seed "$SEED"
    page
}

# Write the page, of what is there so far, and print what is new.
page() {
    python scripts/quickstart/page.py --data "$DATA" --output "$OUT" --page "$WORK/index.html" --seed "$SEED" \
        ${LLAVA_FOLDER:+--llava "$LLAVA_FOLDER"}
}

if [ -z "$LLAVA_LLM" ]; then
    case "$PRESET" in
        long) LLAVA_LLM=smollm2 ;; # time is given
        *) LLAVA_LLM=tiny ;;
    esac
fi
LLAVA_FOLDER=''
if [ -n "$RUN_LLAVA" ]; then
    case "$LLAVA_LLM" in
        smollm2) LLAVA_FOLDER=llava-smollm2 ;;
        *) LLAVA_FOLDER=llava ;;
    esac
fi

stage environment
stage models_and_pictures
read_models
HALF_OF_CORES=$(((CORES + 1) / 2))
while ((128 % RANKS || TUNE_BATCH % RANKS)); do # the batches of both stages must be divisible by the ranks
    RANKS=$((RANKS - 1))
done

stage tune "$SEED"
page # a first look: what is trained, and what stage 1 taught the LLM
stage embed_in_halves "tuned-seed$SEED"
stage first_towers
stage find_pictures
cat "$OUT/found.txt"
if [ -n "$COMPARE" ]; then
    stage compare_teachers
fi
if [ -n "$RUN_LLAVA" ]; then
    stage before_and_after training
    stage before_and_after answers
fi
if [[ -n $RUN_LLAVA && -n $CONTROLS ]]; then
    stage llava_of_controls
fi
page

if [ -n "$COMPARE" ]; then
    cat "$OUT/tables.md"
fi
cat <<END

Open in a browser: $WORK/index.html
The trained tower: $OUT/towers/tuned-seed$SEED
END
if [ -n "$RUN_LLAVA" ]; then
    echo "Every answer of LLaVA: $OUT/$LLAVA_FOLDER/compare/compare.html"
fi
cat <<END

With your own pictures, each with a caption (photos/0001.jpg and photos/0001.txt), and these two models or others:
  .venv/bin/llm2clip data make photos --output photos-tars
  .venv/bin/llm2clip run photos-tars --llm $LLM --tower $TOWER --output runs/photos
  .venv/bin/llm2clip use runs/photos/tower
END
