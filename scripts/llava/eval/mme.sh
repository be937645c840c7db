#!/usr/bin/env bash
# MME: accuracy and accuracy+ of each subtask, perception and cognition.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench mme "$@"
