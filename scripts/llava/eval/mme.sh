#!/usr/bin/env bash
# MME: accuracy and accuracy+ of each subtask, perception and cognition.
exec bash "$(dirname "$0")/benchmark.sh" mme "$@"
