#!/usr/bin/env bash
# POPE: random, popular, adversarial; F1 and its mean.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench pope "$@"
