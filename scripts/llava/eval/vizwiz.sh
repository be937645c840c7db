#!/usr/bin/env bash
# VizWiz: test makes the file for the evaluation server, val (val.json in DATA/vizwiz) is scored here.
exec bash "$(dirname "$0")/benchmark.sh" vizwiz "$@"
