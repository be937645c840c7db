#!/usr/bin/env bash
# GQA, testdev_balanced: exact match.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench gqa "$@"
