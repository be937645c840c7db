#!/usr/bin/env bash
# TextVQA, val 0.5.1, with OCR tokens in the prompt: soft accuracy.
exec bash "$(dirname "$0")/benchmark.sh" textvqa "$@"
