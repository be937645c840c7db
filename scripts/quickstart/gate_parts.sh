# The gate's parts, sourced by gate.sh after parts.sh: the caches of its own teachers, and the tower of each.

neutral_names() { # the captions as SmolLM2 embeds them, read as the raw LLM: without their mean and largest component
    local gate=$DATA/gate
    [ ! -d "$gate/neutral" ] || return 0
    say "captions through the neutral LLM"
    [ -d "$gate/llm" ] || python scripts/quickstart/gate_caches.py llm --output "$gate"
    [ -d "$gate/reading" ] ||
        python scripts/quickstart/inputs.py components llm2clip_plugin/data/emoji/train-noto.tar --llm "$gate/llm" \
            "${READ[@]}" --layer "$NEUTRAL_LAYER" --compute-dtype "$DTYPE" --output "$gate/reading"
    python scripts/quickstart/gate_caches.py neutral "$DATA/all" --llm "$gate/llm" --layer "$NEUTRAL_LAYER" \
        --post-file "$gate/reading/llm2clip_post.safetensors" --output "$gate/neutral"
}
permuted_cache() { # permuted_cache SEED
    [ -d "$DATA/gate/permuted-seed$1" ] ||
        python scripts/quickstart/gate_caches.py permuted "$DATA/all" --cache "$DATA/cache/tuned-seed$1" --seed "$1" \
            --output "$DATA/gate/permuted-seed$1"
}
arm() { # arm NAME SEED: the tower of a teacher
    case "$1" in
        raw) train raw "$2" raw ;;
        random)
            [ -d "$DATA/cache/random" ] ||
                python scripts/quickstart/inputs.py random "$DATA/all" --cache "$DATA/cache/tuned-seed0" \
                    --output "$DATA/cache/random"
            train random "$2" random ;;
        permuted) permuted_cache "$2" && train permuted "$2" "../gate/permuted-seed$2" ;;
        oracle) train oracle "$2" ../gate/neutral ;;
        *) train "$1" "$2" "$1-seed$2" ;;
    esac
}
