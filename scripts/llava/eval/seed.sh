#!/usr/bin/env bash
# SEED-Bench: accuracy by type of question.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench seedbench "$@"
