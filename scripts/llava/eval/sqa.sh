#!/usr/bin/env bash
# ScienceQA: accuracy over all questions and over those with an image (IMG).
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench scienceqa "$@"
