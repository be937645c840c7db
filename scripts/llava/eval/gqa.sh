#!/usr/bin/env bash
# GQA, testdev_balanced: exact match.
exec bash "$(dirname "$0")/benchmark.sh" gqa "$@"
