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
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

read_options "$@"
need MODEL DATA IMAGE_FOLDER PROJECTOR OUTPUT
DEEPSPEED=${DEEPSPEED:-$HERE/zero3.json}
GLOBAL_BATCH=${GLOBAL_BATCH:-128} MICRO_BATCH=${MICRO_BATCH:-16}
inspect
ACCUMULATION=$(accumulation)
launch "checkpoint: $OUTPUT" "llm2clip bench-mllm playground/data/eval --model-path $OUTPUT --output runs/$(basename "$OUTPUT")" \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGE_FOLDER" \
    --vision_tower "$TOWER" \
    --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --mm_projector_type mlp2x_gelu \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --output_dir "$OUTPUT" \
    --num_train_epochs 1 \
    --per_device_train_batch_size "$MICRO_BATCH" \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps 50000 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --lazy_preprocess True
