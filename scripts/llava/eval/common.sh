# What the benchmark scripts share. Sourced by them.
#
#   scripts/llava/eval/NAME.sh CHECKPOINT [OUTPUT] [-- OPTIONS of llava_integration.evaluate]
#
#   DATA=playground/data/eval   LLaVA's evaluation folder      BASE=MODEL      base model of a LoRA checkpoint
#   GPUS=all                    processes, one GPU each        BATCH_SIZE=1    questions answered at once
#   TOWER=PATH                  what the bare name llm2clip means for this run
#   PYTHON=python               of LLaVA's environment
#
# Answers are made by llava_integration.evaluate (the answers of LLaVA's own programs, in batches, resumable) and scored by
# the benchmark's official rule; both are kept in OUTPUT (default: CHECKPOINT/eval).

# bench NAME ARGUMENTS...: answer and score one benchmark
bench() {
    local name=$1 checkpoint output gpus
    shift
    if [ $# -eq 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        sed -n '2,12s/^# \{0,1\}//p' "$(dirname "$0")/common.sh"
        [ $# -gt 0 ] || exit 2
        exit 0
    fi
    checkpoint=$1 output=$1/eval
    shift
    if [ $# -gt 0 ] && [ "$1" != -- ]; then output=$1; shift; fi
    [ -z "${TOWER:-}" ] || export LLM2CLIP_TOWER=$TOWER
    gpus=${GPUS:-$("${PYTHON:-python}" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    # shellcheck disable=SC2086 # all.sh names several
    exec "${PYTHON:-python}" -m llm2clip_plugin.cli bench-mllm --benchmarks $name --model-path "$checkpoint" ${BASE:+--model-base "$BASE"} \
        --data "${DATA:-playground/data/eval}" --output "$output" --gpus "$gpus" --batch-size "${BATCH_SIZE:-1}" "$@"
}
