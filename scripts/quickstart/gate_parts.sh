# The gate's parts, sourced by gate.sh after parts.sh: the caches of its own teachers, and the tower of each.

neutral_llm() { # neutral_llm GATE: SmolLM2 and how it is read, as the raw LLM: without mean and largest component
    [ -d "$1/llm" ] || python scripts/quickstart/gate_caches.py llm --output "$1"
    [ -d "$1/reading" ] ||
        python scripts/quickstart/inputs.py components llm2clip_plugin/data/emoji/train-noto.tar --llm "$1/llm" \
            "${READ[@]}" --layer "$NEUTRAL_LAYER" --compute-dtype "$DTYPE" --output "$1/reading"
}
neutral_names() { # the captions as SmolLM2 embeds them
    local gate=$DATA/gate
    [ ! -d "$gate/neutral" ] || return 0
    say "captions through the neutral LLM"
    neutral_llm "$gate"
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
