#!/usr/bin/env bash
# MMBench, dev: a question is right if every rotation of its options is.
exec bash "$(dirname "$0")/benchmark.sh" mmbench "$@"
