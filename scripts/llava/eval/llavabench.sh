#!/usr/bin/env bash
# LLaVA-Bench (in the wild): answers here, scores by a judge's reviews.
exec bash "$(dirname "$0")/benchmark.sh" llava_bench "$@"
