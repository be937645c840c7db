#!/usr/bin/env bash
# LLaVA 1.5, stage 2: language model and projector learn to converse. LLaVA's own command with our --vision_tower.
#
#   scripts/llava/finetune.sh llava_v1_5_mix665k.json --image-folder playground/data --model lmsys/vicuna-7b-v1.5 \
#       --projector checkpoints/llava-7b-pretrain/mm_projector.bin --output checkpoints/llava-7b [-- MORE OPTIONS OF LLAVA]
#
#   --projector     from pretrain.sh                        --tower         the same as there (default llm2clip)
#   --global-batch  128, for any number of GPUs             --micro-batch   samples per GPU and step (16)
#   --deepspeed     ZeRO configuration (default: zero3.json here)
#   DATA --model --image-folder --output --gpus --hostfile --python --dry-run: as in pretrain.sh
#
# LLM2CLIP_UNFREEZE_TOWER=1 trains the tower too; LLM2CLIP_S2_SCALES=336,672,1008 encodes several scales.
# Each option is also an environment variable: MODEL, DATA, TOWER ... Several nodes under Slurm: scripts/slurm/llava.sbatch.
set -euo pipefail
. "$(dirname "$0")/common.sh"
stage "MODEL DATA IMAGE_FOLDER PROJECTOR OUTPUT" zero3 128 16 "$@"
finetune "checkpoint: $OUTPUT" "" --learning_rate 2e-5
