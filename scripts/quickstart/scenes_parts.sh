# The parts of scenes.sh, sourced after parts.sh and gate_parts.sh: its caches, and the tower of each teacher. $DATA has the
# scenes in all/. A teacher's name with -twins is the same teacher, with twins in training. Adapters, readings and captions of
# stage 1 are those of the quickstart.

make_scenes() {
    if [ ! -d "$DATA/all" ]; then
        python scripts/quickstart/scenes.py --output "$DATA/all"
    fi
}

# complete CACHE: whether it is there and whole.
complete() { grep -qs '"complete": true' "$DATA/cache/$1/manifest.json"; }

# neutral_captions GATE: as SmolLM2 embeds them, read as in gate.sh.
neutral_captions() {
    if complete neutral; then
        return
    fi
    neutral_llm "$1"
    say "scenes' captions through the neutral LLM"
    llm2clip embed "$DATA/all/*.tar" --llm "$1/llm" "${READ[@]}" --layer "$NEUTRAL_LAYER" \
        --post-file "$1/reading/llm2clip_post.safetensors" --compute-dtype "$DTYPE" --cache "$DATA/cache/neutral"
}

# cache_of NAME SEED: prints the name of a teacher's cache.
cache_of() {
    local teacher=${1%-twins}
    case "$teacher" in
        raw | random) echo "$teacher" ;;
        *) echo "$teacher-seed$2" ;;
    esac
}

# scenes_cache NAME SEED: make the cache of a teacher, and those that it is made from.
scenes_cache() {
    local cache
    cache=$(cache_of "$1" "$2")
    if complete "$cache"; then
        return
    fi
    case "${1%-twins}" in
        raw | tuned) embed "$cache" ;;
        map)
            scenes_cache raw "$2"
            fit_map "$2"
            ;;
        random)
            scenes_cache raw "$2"
            python scripts/quickstart/inputs.py random "$DATA/all" --cache "$DATA/cache/raw" --output "$DATA/cache/random"
            ;;
        words)
            scenes_cache raw "$2"
            python scripts/quickstart/scene_words.py "$DATA/all" --cache "$DATA/cache/raw" --seed "$2" \
                --output "$DATA/cache/$cache"
            ;;
        permuted)
            scenes_cache tuned "$2"
            python scripts/quickstart/gate_caches.py permuted "$DATA/all" --cache "$DATA/cache/tuned-seed$2" --seed "$2" \
                --splits train twins --output "$DATA/cache/$cache"
            ;;
    esac
}

# scenes_arm NAME SEED: the tower of a teacher.
scenes_arm() {
    local order=()
    if [[ $1 = *-twins ]]; then
        order=(--shuffle-window 1) # shard after shard, so that a scene and its twin are in one batch
    fi
    scenes_cache "$1" "$2"
    # A mirrored or cropped scene has another caption.
    train "$1" "$2" "$(cache_of "$1" "$2")" --kinds short --augment.no-flip --augment.rotate 0 \
        --augment.scale 0.9 1 --augment.ratio 0.9 1.1 ${order[@]+"${order[@]}"}
}
