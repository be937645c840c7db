#!/usr/bin/env bash
# Run the quickstart again and compare what it measures with the numbers that README.md states.
#   scripts/claims.sh               seed 0 again, about six minutes on two cores: its numbers must lie where a training may
#   scripts/claims.sh --seeds 3     seeds 0 to 2
#   scripts/claims.sh --record      write docs/claims.json and the tables of README and docs/benchmarks.md from the run instead
#                                   (they stand on ten: scripts/claims.sh --seeds 10 --record)
# Other options go to scripts/quickstart.sh; --output DIR keeps the run, and a rerun resumes. Exits with 1 if a number moved.
set -euo pipefail
HERE=$PWD ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
OUTPUT=quickstart-output/claims OPTIONS=() RECORD=
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --record) RECORD=--record ;;
        --output)
            [ $# -gt 1 ] || { echo "error: --output needs a value" >&2; exit 2; }
            OUTPUT=$2
            [[ $OUTPUT == /* ]] || OUTPUT=$HERE/$OUTPUT
            shift ;;
        *) OPTIONS+=("$1") ;;
    esac
    shift
done
scripts/quickstart.sh --no-llava --output "$OUTPUT" ${OPTIONS[@]+"${OPTIONS[@]}"}
exec .venv/bin/python scripts/check_claims.py "$OUTPUT/default" $RECORD
