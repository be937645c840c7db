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
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

read_options "$@"
need MODEL DATA IMAGE_FOLDER OUTPUT
DEEPSPEED=${DEEPSPEED:-$HERE/zero2.json}
GLOBAL_BATCH=${GLOBAL_BATCH:-256} MICRO_BATCH=${MICRO_BATCH:-32}
inspect
ACCUMULATION=$(accumulation)
launch "projector: $OUTPUT/mm_projector.bin" \
    "scripts/llava/finetune.sh INSTRUCTIONS.json --image-folder IMAGES --model $MODEL --tower $TOWER --projector $OUTPUT/mm_projector.bin --output checkpoints/llava-NAME" \
    --model_name_or_path "$MODEL" \
    --version plain \
    --data_path "$DATA" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower "$TOWER" \
    --mm_projector_type mlp2x_gelu \
    --tune_mm_mlp_adapter True \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$MICRO_BATCH" \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 24000 \
    --save_total_limit 1 \
    --learning_rate 1e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True
