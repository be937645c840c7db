#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers only; a judge scores them.
exec bash "$(dirname "$0")/benchmark.sh" llava_bench "$@"
