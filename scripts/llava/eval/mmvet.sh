#!/usr/bin/env bash
# MM-Vet: answers here, scores by its evaluator.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench mmvet "$@"
