#!/usr/bin/env bash
# SEED-Bench: accuracy by question type.
exec bash "$(dirname "$0")/benchmark.sh" seedbench "$@"
