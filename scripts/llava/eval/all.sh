#!/usr/bin/env bash
# Every benchmark whose files are in DATA, one after another; one that fails doesn't take the rest with it.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench "vqav2 gqa vizwiz scienceqa textvqa pope mme mmbench mmbench_cn seedbench llava_bench mmvet" "$@"
