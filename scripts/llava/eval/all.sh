#!/usr/bin/env bash
# Every benchmark whose files are in DATA, one after another; one that fails does not stop the others.
exec bash "$(dirname "$0")/benchmark.sh" all "$@"
