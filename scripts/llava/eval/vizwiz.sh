#!/usr/bin/env bash
# VizWiz: val (val.json in DATA/vizwiz) is scored; for test, the file for the evaluation server is written.
exec bash "$(dirname "$0")/benchmark.sh" vizwiz "$@"
