#!/usr/bin/env bash
# Run the quickstart again and compare what it measures with the numbers that README.md states.
#   scripts/claims.sh               seeds 0 to 2 again: their numbers must lie where a training may
#   scripts/claims.sh --seeds 1     20 minutes on two cores (--no-llava: 13); every other run hides that half of LLaVA's gain is lost
#   scripts/claims.sh --record      write docs/claims*.json and the tables of README and docs/benchmarks.md from the run instead;
#                                   --record towers, --record llava: those alone. Towers stand on ten seeds (--seeds 10 --controls
#                                   --no-llava --record towers), LLaVA on six (--seeds 6 --controls --record llava); --record map:
#                                   the column of the linear map alone, which may have fewer seeds than the others
# Others go to scripts/quickstart.sh, as --controls, which are then checked, too; --output DIR keeps the run to resume. Exits
# with 1 if a difference, a level or a part's gains lie outside what so many more trainings may give (check_claims.py).
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/options.sh"
OUTPUT=$ROOT/quickstart-output/claims
OPTIONS=(--seeds 3)
RECORD=()
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) read_options "" "$1" ;;
        --record)
            RECORD=(--record)
            case "${2:-}" in
                towers | map | llava | all)
                    RECORD+=("$2")
                    shift
                    ;;
            esac
            ;;
        --output)
            OUTPUT=${2:?error: --output needs a value}
            shift
            ;;
        *) OPTIONS+=("$1") ;;
    esac
    shift
done
"$ROOT/scripts/quickstart.sh" --compare --output "$OUTPUT" --llava-llm tiny "${OPTIONS[@]}"
exec "$ROOT/.venv/bin/python" "$ROOT/scripts/check_claims.py" "$OUTPUT/table" ${RECORD[@]+"${RECORD[@]}"}
