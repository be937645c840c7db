#!/usr/bin/env bash
# LLaVA 1.5, stage 2 by LoRA: on one to eight smaller GPUs. LLaVA's own command with our --vision_tower.
#
#   scripts/llava/finetune_lora.sh llava_v1_5_mix665k.json --image-folder playground/data --model lmsys/vicuna-7b-v1.5 \
#       --projector checkpoints/llava-7b-pretrain/mm_projector.bin --output checkpoints/llava-7b-lora [-- MORE OPTIONS OF LLAVA]
#
# Options and variables: as in finetune.sh. Keep "lora" and "llava" in the name of --output: LLaVA reads them when it loads.
set -euo pipefail
. "$(dirname "$0")/common.sh"
stage "MODEL DATA IMAGE_FOLDER PROJECTOR OUTPUT" zero3 128 16 "$@"
finetune "checkpoint (LoRA): $OUTPUT" " --model-base $(quoted "$MODEL")" \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4
