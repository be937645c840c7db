#!/usr/bin/env bash
# MMBench, dev: every rotation of the options has to be right; makes the server's file too.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench mmbench "$@"
