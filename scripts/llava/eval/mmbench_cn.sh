#!/usr/bin/env bash
# MMBench-CN, dev.
exec bash "$(dirname "$0")/benchmark.sh" mmbench_cn "$@"
