#!/usr/bin/env bash
# LLaVA in miniature: is a small LLaVA better with the trained tower than with the same tower before training?
#
#   scripts/quickstart/miniature.sh --before TOWER --after TOWER --output DIR [--smoke] [--steps TEXT CAPTIONS QUESTIONS]
#                                   [--seeds N] [--environment .venv | .venv-llava]
#
# TOWER: a tower directory, or a plain Hugging Face vision directory (imported first). Unmodified LLaVA 1.5, three stages a
# side, identical except for the tower: a Llama of 2.5 million weights learns words (once), then the projector is trained on
# captions, then both on questions; they are evaluated on unseen pictures. It shows that the pipeline works and how useful
# two towers are to the same tiny model, not what a 7B model would answer.
# --seeds N: N trainings a side, whose spread the comparison counts; {seed} in --after is the seed: towers/tuned-seed{seed}.
# LLaVA's code runs in the training environment, .venv, on today's libraries; in .venv-llava it runs on transformers 4.37.2.
# LLAVA_PYTHON=/path/to/python: another environment that has LLaVA and this package.
# Rerun the same command to resume: finished parts are skipped. The two sides run in parallel.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
BEFORE='' AFTER='' OUT='' SEEDS=1 ENVIRONMENT=.venv CONCEPTS=0 TEXT_STEPS=60 CAPTION_STEPS=40 QUESTION_STEPS=200
while [ $# -gt 0 ]; do
    case "$1" in
        --before) BEFORE=$(realpath "$2"); shift ;;
        --after) AFTER=$(realpath "$2"); shift ;;
        --output) mkdir -p "$2"; OUT=$(realpath "$2"); shift ;;
        --smoke) CONCEPTS=60 TEXT_STEPS=6 CAPTION_STEPS=4 QUESTION_STEPS=6 ;;
        --seeds) SEEDS=$2; shift ;;
        --environment) ENVIRONMENT=$2; shift ;;
        --steps) TEXT_STEPS=$2 CAPTION_STEPS=$3 QUESTION_STEPS=$4; shift 3 ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) echo "error: unknown option $1" >&2; exit 2 ;;
    esac
    shift
done
case "$SEEDS" in *[!0-9]* | "" | 0) echo "error: --seeds $SEEDS is not a number above 0" >&2; exit 2 ;; esac
for given in BEFORE AFTER OUT; do [ -n "${!given}" ] || { echo "error: --${given,,} is missing; see $0 --help" >&2; exit 2; }; done

cd "$ROOT"
if [ -z "${LLAVA_PYTHON:-}" ]; then
    . scripts/environments.sh
    case "$ENVIRONMENT" in
        .venv) train_environment .venv "$(extras_of .venv)" ;;
        .venv-llava) llava_environment .venv-llava ;;
        *) echo "error: unknown environment $ENVIRONMENT; known: .venv, .venv-llava (or set LLAVA_PYTHON)" >&2; exit 2 ;;
    esac
    extensions_of "$ENVIRONMENT"
    LLAVA_PYTHON=$ROOT/$ENVIRONMENT/bin/python
fi
"$LLAVA_PYTHON" -c 'import easy_vqa' 2>/dev/null || "$LLAVA_PYTHON" -m pip install -q --no-deps easy-vqa==1.0
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE WANDB_DISABLED=true TRANSFORMERS_VERBOSITY=error
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # so small a model gains nothing from several GPUs
CORES=$(nproc)
say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*" >&2; }
failed() { tail -n 20 "$1" >&2; exit 1; }
LOG_EVERY=$((QUESTION_STEPS > 20 ? 20 : 2)) # steps

losses() { # losses NAME STEPS: print the losses in LLaVA's log
    local line step=0
    while read -r line; do
        if [[ $line =~ \'loss\':\ \'?([0-9.]+) ]]; then # transformers 5 quotes the number
            step=$((step + LOG_EVERY))
            echo "        $1: step $step of $2, loss ${BASH_REMATCH[1]}" >&2
        fi
    done
}

# stage NAME STEPS SEED OPTION...: run one of LLaVA's stages into $OUT/NAME, unless it is finished; log in $OUT/NAME.log
stage() {
    local name=$1 steps=$2 seed=$3
    shift 3
    [ -f "$OUT/$name/trainer_state.json" ] && return
    rm -rf "${OUT:?}/$name"
    say "LLaVA stage: $name, $steps steps"
    "$LLAVA_PYTHON" -u -m llava.train.train --output_dir "$OUT/$name" --image_folder "$OUT/data/images" --bf16 True \
        --per_device_train_batch_size 32 --save_strategy no --evaluation_strategy no --lr_scheduler_type cosine --warmup_ratio 0.03 \
        --logging_steps $LOG_EVERY --disable_tqdm True --model_max_length 200 --lazy_preprocess True --report_to none \
        --dataloader_num_workers 0 --seed "$seed" --learning_rate 2e-3 --max_steps "$steps" \
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False \
        "$@" 2>&1 | tee "$OUT/$name.log" | losses "$name" "$steps" || failed "$OUT/$name.log"
}

say "preparing pictures, questions and an untrained language model"
[ -d "$OUT/llm" ] || "$LLAVA_PYTHON" scripts/quickstart/miniature.py prepare --output "$OUT" --concepts "$CONCEPTS"
OMP_NUM_THREADS=$CORES stage words "$TEXT_STEPS" 0 --model_name_or_path "$OUT/llm" --version v1 --data_path "$OUT/data/text.json"

side() { # side NAME TOWER SEED
    local name=$1 tower=$2 seed=$3
    if [ ! -f "$tower/llm2clip.json" ]; then
        [ -d "$OUT/towers/$name" ] || "$LLAVA_PYTHON" -m llm2clip_plugin.cli import "$tower" --output "$OUT/towers/$name" >/dev/null
        tower=$OUT/towers/$name
    fi
    [ "$seed" = 0 ] || name=$name-seed$seed
    stage "llava-$name-pretrain" "$CAPTION_STEPS" "$seed" --model_name_or_path "$OUT/words" --version plain \
        --data_path "$OUT/data/captions.json" --vision_tower "llm2clip:$tower" --tune_mm_mlp_adapter True
    stage "llava-$name" "$QUESTION_STEPS" "$seed" --model_name_or_path "$OUT/words" --version v1 --data_path "$OUT/data/finetune.json" \
        --vision_tower "llm2clip:$tower" --pretrain_mm_mlp_adapter "$OUT/llava-$name-pretrain/mm_projector.bin" --image_aspect_ratio pad
    say "answering questions about unseen pictures: $name"
    "$LLAVA_PYTHON" -m llava_integration.evaluate --model-path "$OUT/llava-$name" --question-file "$OUT/data/questions.jsonl" \
        --image-folder "$OUT/data/images" --answers-file "$OUT/$name.answers.jsonl" --batch-size 64 --max_new_tokens 12 \
        --dtype float32 --workers 0 2>"$OUT/$name.answers.log" || failed "$OUT/$name.answers.log"
}
export OMP_NUM_THREADS=$((CORES > 1 ? CORES / 2 : 1))
names=()
for seed in $(seq 0 $((SEEDS - 1))); do
    side before "$BEFORE" "$seed" & first=$!
    side after "${AFTER//\{seed\}/$seed}" "$seed" & second=$!
    wait "$first" && wait "$second" || { wait; exit 1; }
    if [ "$seed" = 0 ]; then names+=(before after); else names+=("before-seed$seed" "after-seed$seed"); fi
done

say "comparison"
"$LLAVA_PYTHON" scripts/quickstart/miniature.py score "${names[@]}" --output "$OUT"
"$LLAVA_PYTHON" -m llm2clip_plugin.cli compare "$OUT/scores/before" "$OUT/scores/after" --names before after --output "$OUT/compare" --no-references
say "done: $OUT/compare/compare.html shows where the two disagree, with pictures"
echo "This is a miniature: a language model of 2.5 million weights, trained from scratch, on pictures of 56 to 98 pixels." >&2
