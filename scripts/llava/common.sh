# Sourced by pretrain.sh, finetune.sh and finetune_lora.sh: options, LLaVA's own, launcher.
# Every option is also an environment variable of its name in capitals: --tower = TOWER, --global-batch = GLOBAL_BATCH ...
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/../options.sh"
# The working directory's modules don't run in place of the libraries': for Python 3.11 and newer, and for what it starts;
# and for Python 3.10, python -c "$RUN_MODULE" MODULE WORD...
export PYTHONSAFEPATH=1
SAFE="import sys; sys.path[0] or sys.path.pop(0)"
RUN_MODULE="$SAFE; del sys.argv[0]; import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
INSTALL="pip install '$(cd "$HERE/../.." && pwd)[train]' && pip install --no-deps llava-torch==1.2.2.post1"

# has_llava PYTHON
HAS_LLAVA="$SAFE
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ('torch', 'llava', 'llava_integration'))))
"
has_llava() {
    "$1" -c "$HAS_LLAVA" 2>/dev/null
}

# Sets PYTHON, unless it is set, to the first that has LLaVA: the active environment, .venv, .venv-llava.
choose_python() {
    local known=("${PYTHON:-python}")
    if [ -z "${PYTHON:-}" ]; then
        known+=("$HERE/../../.venv/bin/python" "$HERE/../../.venv-llava/bin/python")
    fi
    for PYTHON in "${known[@]}"; do
        if has_llava "$PYTHON"; then
            return
        fi
    done
    fail "no torch, LLaVA or llm2clip-plugin in ${known[*]}; choose another with PYTHON; to install them: $INSTALL"
}

# stage NEEDED ZERO BATCH MICRO [DATA] OPTION...: reads the options, whose defaults are a ZeRO stage and samples in all and a GPU,
# and refuses those that would stop the stage. Sets what they are called, LLAVA (its package), SCRIPT (training program), GPUS
# (per node), ACCUMULATION (of gradients, so that the global batch does not depend on the number of GPUs), CUDA (0 or 1),
# BF16 (True, or False on a CPU that computes float32 faster), REPORT_TO, QUIET (options of DeepSpeed's launcher); EXTRA gets LLaVA's own options, after --.
stage() {
    local needed=$1
    local name
    DEEPSPEED=${DEEPSPEED:-$HERE/$2.json}
    GLOBAL_BATCH=${GLOBAL_BATCH:-$3}
    MICRO_BATCH=${MICRO_BATCH:-$4}
    TOWER=${TOWER:-llm2clip}
    REPORT_TO=${REPORT_TO:-none}
    read_options "model data image-folder tower projector output hostfile gpus port deepspeed global-batch micro-batch python dry-run=0" \
        "${@:5}"
    [ ${#ARGUMENTS[@]} -lt 2 ] || fail "unexpected argument ${ARGUMENTS[1]}"
    DATA=${ARGUMENTS[0]:-${DATA:-}}
    choose_python
    for name in $needed; do
        [ -n "${!name:-}" ] || fail "--$(echo "${name,,}" | tr _ -) (or $name=...) is required; see $0 --help"
    done
    if [ -n "$DEEPSPEED" ] && [ ! -e "$DEEPSPEED" ]; then
        fail "$DEEPSPEED does not exist"
    fi
    inspect
    local world
    world=$(ranks_in_all) || exit 2
    local once=$((world * MICRO_BATCH))
    [ $((GLOBAL_BATCH % once)) -eq 0 ] ||
        fail "--global-batch $GLOBAL_BATCH is not a multiple of $world ranks x --micro-batch $MICRO_BATCH = $once; choose another --micro-batch"
    ACCUMULATION=$((GLOBAL_BATCH / once))
}

# Checks the options, and asks the environment and this machine for what `stage` sets.
inspect() {
    local inspected
    local words=("$(basename "$0" .sh)" --model "$MODEL" --data "$DATA" --image-folder "$IMAGE_FOLDER"
        --tower "$TOWER" --output "$OUTPUT")
    if [ -n "${PROJECTOR:-}" ]; then
        words+=(--projector "$PROJECTOR")
    fi
    inspected=$("$PYTHON" -c "$RUN_MODULE" llava_integration.plug.preflight "${words[@]}" -- "${EXTRA[@]}") || exit 2
    {
        read -r LLAVA
        read -r SCRIPT
        read -r SEEN # GPUs
        read -r BF16
        read -r FREE_PORT
        read -r QUIET || true
    } <<<"$inspected"
    SCRIPT=$LLAVA/train/$SCRIPT
    CUDA=$((SEEN > 0))
    GPUS=${GPUS:-$((SEEN > 0 ? SEEN : 1))}
    PORT=${PORT:-$FREE_PORT}
}

# Prints the number of ranks on all nodes.
ranks_in_all() {
    local nodes=${SLURM_JOB_NUM_NODES:-1}
    if [ -n "${HOSTFILE:-}" ]; then
        check_passed_variables
        ranks_of_hostfile
        return
    fi
    if [ "$SEEN" -gt 0 ] && [ "$nodes" = 1 ] && [ "$GPUS" -gt "$SEEN" ]; then
        fail "--gpus $GPUS: only $SEEN are visible on this machine"
    fi
    echo $((GPUS * nodes))
}

ranks_of_hostfile() {
    local count
    count=$(sed 's/#.*//' "$HOSTFILE" |
        awk 'match($0, /slots=[0-9]+/) { n += substr($0, RSTART + 6, RLENGTH - 6) } END { print n + 0 }')
    [ "$count" -gt 0 ] || fail "$HOSTFILE has no line such as: node-1 slots=8"
    echo "$count"
}

# DeepSpeed passes only some variables to the other nodes, and those in ~/.deepspeed_env.
check_passed_variables() {
    local name
    for name in LLM2CLIP_TOWER LLM2CLIP_S2_SCALES LLM2CLIP_UNFREEZE_TOWER; do
        if [ -n "${!name:-}" ] && ! grep -qs "^$name=" ~/.deepspeed_env .deepspeed_env; then
            fail "$name is not passed to the other nodes; add $name=${!name} to ~/.deepspeed_env"
        fi
    done
}

# quoted WORD...: a command in one line, as a shell reads it.
quoted() {
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
}

# launch RESULT NEXT LLAVA_OPTIONS...: one node, --hostfile, or the nodes of a Slurm job. EXTRA comes last and takes
# precedence. Says where the RESULT will be, and which command comes NEXT.
launch() {
    local result=$1
    local next=$2
    local launcher program
    local words=()
    shift 2
    local shared=( # by LLaVA 1.5's stages
        --model_name_or_path "$MODEL" --data_path "$DATA" --image_folder "$IMAGE_FOLDER" --vision_tower "$TOWER" --output_dir "$OUTPUT"
        --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
        --bf16 "$BF16" --num_train_epochs 1 --gradient_accumulation_steps "$ACCUMULATION"
        --per_device_train_batch_size "$MICRO_BATCH" --per_device_eval_batch_size 4
        --evaluation_strategy no --save_strategy steps --save_total_limit 1 --logging_steps 1
        --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True)
    if [ "$CUDA" = 1 ]; then
        words+=(--tf32 True)
    else
        export DS_ACCELERATOR=cpu
    fi
    program=$(dirname "$(command -v "$PYTHON")")/deepspeed
    if [ ! -x "$program" ]; then
        program=deepspeed
    fi
    # shellcheck disable=SC2206 # options are words
    launcher=("$program" $QUIET)
    if [ -n "${HOSTFILE:-}" ]; then
        launcher+=(--hostfile "$HOSTFILE" --master_port "$PORT")
    elif [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
        local head hosts
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into head: scontrol would end with SIGPIPE
        head=${hosts%%$'\n'*}
        launcher=(srun --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 "$PYTHON" -m torch.distributed.run
            --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$GPUS" --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID"
            --rdzv_endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))")
    else
        launcher+=(--num_gpus "$GPUS" --master_port "$PORT")
    fi
    words=("${launcher[@]}" "$SCRIPT" --deepspeed "$DEEPSPEED" "${shared[@]}" "$@" "${words[@]}" --report_to "$REPORT_TO" "${EXTRA[@]}")
    quoted "${words[@]}" >&2
    if [ -n "${DRY_RUN:-}" ]; then
        return
    fi
    printf '%s\nnext: %s\n' "$result" "$next" >&2
    exec "${words[@]}" # signals reach it
}

# finetune RESULT BENCH LLAVA_OPTIONS...: launch what both ways have alike; BENCH: more of the command that comes next.
finetune() {
    local bench
    bench="llm2clip bench-mllm playground/data/eval --model-path $(quoted "$OUTPUT")$2"
    bench+=" --output $(quoted "runs/$(basename "$OUTPUT")")"
    launch "$1" "$bench" \
        --version v1 --pretrain_mm_mlp_adapter "$PROJECTOR" --image_aspect_ratio pad --group_by_modality_length True \
        --save_steps 50000 "${@:3}"
}
