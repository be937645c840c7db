#!/usr/bin/env bash
# TextVQA, val 0.5.1, with OCR tokens in the prompt: soft accuracy.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench textvqa "$@"
