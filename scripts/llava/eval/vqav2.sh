#!/usr/bin/env bash
# VQAv2: test-dev makes the file for the evaluation server, val (its annotations in DATA/vqav2) is scored here.
exec bash "$(dirname "$0")/benchmark.sh" vqav2 "$@"
