#!/usr/bin/env bash
# LLaVA 1.5, stage 1: the projector learns to read the tower. LLaVA's own command with our --vision_tower.
#
#   scripts/llava/pretrain.sh blip_laion_cc_sbu_558k.json --image-folder LLaVA-Pretrain/images --model lmsys/vicuna-7b-v1.5 \
#       --output checkpoints/llava-7b-pretrain [--tower llm2clip:PATH] [-- MORE OPTIONS OF LLAVA]
#
#   --model         language model (folder or Hub id)      --tower         default llm2clip: see `llm2clip use`
#   DATA            LLaVA's pretraining JSON                --image-folder  its image folder
#   --output        where mm_projector.bin goes             --deepspeed     ZeRO configuration (default: zero2.json here)
#   --gpus          of this node (default: all)             --hostfile      several nodes, as DeepSpeed's
#   --global-batch  256, for any number of GPUs             --micro-batch   samples per GPU and step (32)
#   --python        the environment (default: the active     --dry-run       check everything, print the command
#                   one, .venv or .venv-llava: the first that has LLaVA)
#
# Each is also an environment variable: MODEL, DATA, TOWER, GLOBAL_BATCH ... Several nodes under Slurm: scripts/slurm/llava.sbatch.
set -euo pipefail
. "$(dirname "$0")/common.sh"
stage "MODEL DATA IMAGE_FOLDER OUTPUT" zero2 256 32 "$@"
next="scripts/llava/finetune.sh INSTRUCTIONS.json --image-folder IMAGES --model $(quoted "$MODEL")"
next+=" --tower $(quoted "$TOWER") --projector $(quoted "$OUTPUT/mm_projector.bin") --output checkpoints/llava-NAME"
launch "projector: $OUTPUT/mm_projector.bin" "$next" \
    --version plain --tune_mm_mlp_adapter True --save_steps 24000 --learning_rate 1e-3
