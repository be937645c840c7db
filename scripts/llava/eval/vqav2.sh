#!/usr/bin/env bash
# VQAv2: val (its annotations in DATA/vqav2) is scored; for test-dev, the file for the evaluation server is written.
exec bash "$(dirname "$0")/benchmark.sh" vqav2 "$@"
