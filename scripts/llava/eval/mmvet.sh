#!/usr/bin/env bash
# MM-Vet: answers only; its evaluator scores them.
exec bash "$(dirname "$0")/benchmark.sh" mmvet "$@"
