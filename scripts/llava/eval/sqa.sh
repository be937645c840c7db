#!/usr/bin/env bash
# ScienceQA: accuracy over all questions and over those with an image (IMG).
exec bash "$(dirname "$0")/benchmark.sh" scienceqa "$@"
