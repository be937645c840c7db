#!/usr/bin/env bash
# Does a teacher's knowledge help with scenes, whose captions are all different? Two drawings in a picture (scenes.py); towers
# before stage 2, against random and permuted embeddings, sums of random vectors of words (scene_words.py), the raw LLM, a linear
# map on it, and the fine-tuned LLM; asked for the captions of new scenes, and to tell a scene from its twin, by a ridge
# regression (scene_scores.py).
#
#   scripts/quickstart/scenes.sh                              three seeds, 50 steps of stage 2; some minutes of a core a tower
#   scripts/quickstart/scenes.sh --arms "permuted words raw"  these teachers alone, and the tower before stage 2
#   scripts/quickstart/scenes.sh --arms "tuned tuned-twins"   a teacher's name with -twins: as many pictures in training, half of
#                                                             them the twins of the others, in the same batch
#   scripts/quickstart/scenes.sh --llava                      then a small LLaVA on each tower is asked (scene_questions.py; a
#                                                             quarter of an hour of a core each)
#
# --output DIR: as of quickstart.sh, which makes what is missing there (models, adapters). The tables are printed, and lie in
# scenes.json and questions/. Rerun the same command to resume.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/scripts/options.sh"
SEEDS=3
STEPS=50
ARMS='permuted words raw tuned map random'
OUTPUT=''
LLAVA=''
read_options "seeds steps arms output llava=0" "$@"
for number in "$SEEDS" "$STEPS"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number is not a number above 0"
done
for arm in $ARMS; do
    one_of --arms "$arm" {permuted,words,raw,tuned,map,random}{,-twins}
done
WORK=$(realpath -ms "${OUTPUT:-$ROOT/quickstart-output}")
cd "$ROOT"
"$ROOT/scripts/quickstart.sh" --compare --no-llava --seeds "$SEEDS" --output "$WORK"

. scripts/environments.sh
. scripts/quickstart/parts.sh
. scripts/quickstart/gate_parts.sh
. scripts/quickstart/scenes_parts.sh
gate_environment
DATA=$WORK/scenes
OUT=$WORK/scenes-towers
if [ "$STEPS" != 50 ]; then
    OUT=$WORK/scenes-towers-$STEPS-steps
fi

make_scenes
for part in llm reading; do # adapters, and what the raw LLM is read without
    if [ ! -e "$DATA/$part" ]; then
        ln -s "../data/$part" "$DATA/$part"
    fi
done
neutral_captions "$WORK/data/gate"
for seed in $(seq 0 $((SEEDS - 1))); do
    for name in $ARMS; do
        scenes_arm "$name" "$seed"
    done
done
python scripts/quickstart/scene_scores.py --data "$DATA" --output "$OUT" --before "$TOWER"
if [ -n "$LLAVA" ]; then
    # shellcheck disable=SC2046,SC2086 # words on purpose
    python scripts/quickstart/scene_questions.py --data "$DATA/all" --towers "$OUT/towers" --llm "$WORK/data/gate/llm" \
        --output "$OUT/questions" --arms $ARMS --seeds $(seq 0 $((SEEDS - 1)))
fi
