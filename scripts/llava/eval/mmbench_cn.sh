#!/usr/bin/env bash
# MMBench-CN, dev.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench mmbench_cn "$@"
