#!/usr/bin/env bash
# Answers and scores one benchmark, or all of them, with a LLaVA checkpoint.
#
#   scripts/llava/eval.sh NAME CHECKPOINT [OUTPUT] [-- OPTIONS of llm2clip llava evaluate]
#
#   NAME                        a name of llm2clip bench-mllm --benchmarks, or all: every benchmark with its files in DATA
#   DATA=playground/data/eval   LLaVA's evaluation folder      BASE=MODEL      base model of a LoRA checkpoint
#   GPUS=all                    processes, one GPU each        BATCH_SIZE=1    questions in a batch
#   TOWER=PATH                  the tower that the bare name llm2clip stands for
#   PYTHON=python               the environment (default: the active one, .venv or .venv-llava: the first that has LLaVA)
#
# llm2clip llava evaluate generates the answers (those of LLaVA's own programs, in batches, resumable), and each
# benchmark's official rule scores them; both are kept in OUTPUT (default: CHECKPOINT/eval).
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

if [ $# -lt 2 ] || [ "$2" = -h ] || [ "$2" = --help ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    case "${*: -1}" in -h | --help) exit 0 ;; *) exit 2 ;; esac
fi
name=$1 checkpoint=$2 output=$2/eval
shift 2
if [ $# -gt 0 ] && [ "$1" != -- ]; then output=$1; shift; fi
[ -z "${TOWER:-}" ] || export LLM2CLIP_TOWER=$TOWER
[ "$name" != all ] || name=
choose_python
gpus=${GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec "$PYTHON" -m llm2clip_plugin.cli bench-mllm ${name:+--benchmarks "$name"} --model-path "$checkpoint" \
    ${BASE:+--model-base "$BASE"} --data "${DATA:-playground/data/eval}" --output "$output" --gpus "$gpus" \
    --batch-size "${BATCH_SIZE:-1}" "$@"
