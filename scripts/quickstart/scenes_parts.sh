# The parts of scenes.sh, sourced after parts.sh and gate_parts.sh: its caches, and the tower of each teacher. $DATA has the
# scenes in all/. A teacher's name with -twins is the same teacher, with twins in training. Adapters, readings and captions of
# stage 1 are those of the quickstart.

make_scenes() {
    [ -d "$DATA/all" ] || python scripts/quickstart/scenes.py --output "$DATA/all"
}
complete() { grep -qs '"complete": true' "$DATA/cache/$1/manifest.json"; }
neutral_captions() { # neutral_captions GATE: as SmolLM2 embeds them, read as in gate.sh
    ! complete neutral || return 0
    neutral_llm "$1"
    say "scenes' captions through the neutral LLM"
    llm2clip embed "$DATA/all/*.tar" --llm "$1/llm" "${READ[@]}" --layer "$NEUTRAL_LAYER" \
        --post-file "$1/reading/llm2clip_post.safetensors" --compute-dtype "$DTYPE" --cache "$DATA/cache/neutral"
}
scenes_cache() { # scenes_cache NAME SEED: the cache of a teacher; sets CACHE
    local teacher=${1%-twins}
    local seeded=$teacher-seed$2
    CACHE=$seeded
    case "$teacher" in
        raw | random) CACHE=$teacher ;;
        permuted) scenes_cache tuned "$2" && CACHE=$seeded ;;
    esac
    ! complete "$CACHE" || return 0
    case "$teacher" in
        raw | tuned) embed "$CACHE" ;;
        map) scenes_cache raw "$2" && fit_map "$2" && CACHE=$seeded ;;
        random) python scripts/quickstart/inputs.py random "$DATA/all" --cache "$DATA/cache/raw" --output "$DATA/cache/random" ;;
        words)
            scenes_cache raw "$2" && CACHE=$seeded
            python scripts/quickstart/scene_words.py "$DATA/all" --cache "$DATA/cache/raw" --seed "$2" --output "$DATA/cache/$seeded" ;;
        permuted)
            python scripts/quickstart/gate_caches.py permuted "$DATA/all" --cache "$DATA/cache/tuned-seed$2" --seed "$2" \
                --splits train twins --output "$DATA/cache/$seeded" ;;
    esac
}
scenes_arm() { # scenes_arm NAME SEED: the tower of a teacher
    local order=()
    [[ $1 != *-twins ]] || order=(--shuffle-window 1) # shard after shard, so that a scene and its twin are in one batch
    scenes_cache "$1" "$2"
    # a mirrored or cropped scene has another caption
    train "$1" "$2" "$CACHE" --kinds short --augment.no-flip --augment.rotate 0 --augment.scale 0.9 1 --augment.ratio 0.9 1.1 \
        ${order[@]+"${order[@]}"}
}
