#!/usr/bin/env bash
# POPE: random, popular, adversarial; F1 and its mean.
exec bash "$(dirname "$0")/benchmark.sh" pope "$@"
