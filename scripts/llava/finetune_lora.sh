#!/usr/bin/env bash
# LLaVA 1.5, stage 2 by LoRA: on one to eight smaller GPUs. LLaVA's own command with our --vision_tower.
#
#   scripts/llava/finetune_lora.sh llava_v1_5_mix665k.json --image-folder playground/data --model lmsys/vicuna-7b-v1.5 \
#       --projector checkpoints/llava-7b-pretrain/mm_projector.bin --output checkpoints/llava-7b-lora [-- MORE OPTIONS OF LLAVA]
#
# Options and variables: as in finetune.sh. Keep "lora" and "llava" in the name of --output: LLaVA reads them when it loads.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

read_options "$@"
need MODEL DATA IMAGE_FOLDER PROJECTOR OUTPUT
DEEPSPEED=${DEEPSPEED:-$HERE/zero3.json}
GLOBAL_BATCH=${GLOBAL_BATCH:-128} MICRO_BATCH=${MICRO_BATCH:-16}
inspect
launch "checkpoint (LoRA): $OUTPUT" \
    "llm2clip bench-mllm playground/data/eval --model-path $OUTPUT --model-base $MODEL --output runs/$(basename "$OUTPUT")" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --version v1 --pretrain_mm_mlp_adapter "$PROJECTOR" --image_aspect_ratio pad --group_by_modality_length True \
    --save_steps 50000 --learning_rate 2e-4
