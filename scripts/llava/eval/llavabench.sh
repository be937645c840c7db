#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers here, scores by a judge's reviews.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench llava_bench "$@"
