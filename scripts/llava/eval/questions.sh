#!/usr/bin/env bash
# Own questions: questions/questions.jsonl in DATA, or DATA=FILE.jsonl; lines with image, question and answer.
exec bash "$(dirname "$0")/benchmark.sh" questions "$@"
