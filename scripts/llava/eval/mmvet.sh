#!/usr/bin/env bash
# MM-Vet: answers here, scores by its evaluator.
exec bash "$(dirname "$0")/benchmark.sh" mmvet "$@"
