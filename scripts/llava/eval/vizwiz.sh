#!/usr/bin/env bash
# VizWiz: test makes the file for the evaluation server, val (val.json in DATA/vizwiz) is scored here.
#
set -euo pipefail
. "$(dirname "$0")/common.sh"
bench vizwiz "$@"
