#!/usr/bin/env bash
# Does what a teacher knows reach what LLaVA reads? Asked by a ridge regression before any LLaVA is trained (gate.py): towers
# before stage 2, against random and permuted embeddings, random vectors of letters, the raw LLM, a linear map on it, the
# fine-tuned LLM, and an oracle.
#
#   scripts/quickstart/gate.sh                          three seeds, 50 steps of stage 2 as the quickstart; two minutes of a core a tower
#   scripts/quickstart/gate.sh --steps 200 --seeds 1    longer towers, in a folder of their own; also what the steps bring to retrieval,
#                                                       against all lower numbers that were run (longer.py; --rendered DIR:
#                                                       in one more style)
#   scripts/quickstart/gate.sh --arms "permuted tuned"  these teachers alone, and the tower before stage 2
#   scripts/quickstart/gate.sh --llava                  then a small LLaVA on each tower: does it name what it was never shown?
#                                                       (inherited.py; a quarter of an hour of a core each)
#
# --output DIR: as of quickstart.sh, which makes what is missing there (models, data, adapters, caches of the teachers). The
# tables are printed, and lie in gate.json, longer.json and inherited/. Rerun the same command to resume.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/scripts/options.sh"
SEEDS=3
STEPS=50
ARMS='permuted spelling tuned raw map oracle random'
OUTPUT=''
LLAVA=''
RENDERED=''
read_options "seeds steps arms output llava=0 rendered" "$@"
for number in "$SEEDS" "$STEPS"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number is not a number above 0"
done
for arm in $ARMS; do
    one_of --arms "$arm" permuted spelling tuned raw map oracle random
done
if [ -n "$RENDERED" ]; then
    [ -d "$RENDERED" ] || fail "--rendered: no folder $RENDERED"
    RENDERED=$(realpath "$RENDERED")
fi
WORK=$(realpath -ms "${OUTPUT:-$ROOT/quickstart-output}")
cd "$ROOT"
"$ROOT/scripts/quickstart.sh" --compare --no-llava --seeds "$SEEDS" --output "$WORK"

. scripts/environments.sh
. scripts/quickstart/parts.sh
. scripts/quickstart/gate_parts.sh
gate_environment
DATA=$WORK/data
OUT=$WORK/table
if [ "$STEPS" != 50 ]; then
    OUT=$WORK/gate-$STEPS-steps
fi

neutral_names
for seed in $(seq 0 $((SEEDS - 1))); do
    for name in $ARMS; do
        arm "$name" "$seed"
    done
done
python scripts/quickstart/gate.py --data "$DATA" --output "$OUT" --before "$TOWER"
if [ "$STEPS" != 50 ] && [[ " $ARMS " =~ " "(raw|map|tuned)" " ]]; then
    outputs=("$WORK/table")
    for output in "$WORK"/gate-*-steps; do # those of as many steps or fewer
        number=${output##*/gate-}
        if [ "${number%-steps}" -le "$STEPS" ]; then
            outputs+=("$output")
        fi
    done
    python scripts/quickstart/longer.py --data "$DATA" --outputs "${outputs[@]}" \
        ${RENDERED:+--rendered "$RENDERED"}
fi
if [ -n "$LLAVA" ]; then
    # shellcheck disable=SC2046,SC2086 # words on purpose
    python scripts/quickstart/inherited.py --towers "$OUT/towers" --llm "$DATA/gate/llm" --output "$OUT/inherited" \
        --arms $ARMS --seeds $(seq 0 $((SEEDS - 1)))
fi
