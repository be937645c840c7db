# The quickstart's parts, sourced by quickstart.sh: which shards, cache and adapter each of them reads. What a part read is in
# the run's records (run.json, the cache's manifest), and measure.py refuses towers that were trained on anything else.

# How the LLM is read, in stage 1 and without it: the last token of PromptEOL (arXiv 2307.16645).
READ=(--attention causal --pooling last --chat-template 'This sentence: "{caption}" means in one word: "')
# The LLM without stage 1, the strongest control, is read as `evaluate captions --search` found best (docs/benchmarks.md).

# Shards whose captions are different, so that each half can be embedded on its own: training and validation; the test.
HALVES=("[tv][ra]*.tar" "test-*.tar")

# Sets LLM and TOWER to the models in $WORK, DTYPE and PRECISION to what computes fastest, GPUS and CORES to what there is, and
# RANKS: one per GPU, or two on a CPU with two cores.
read_models() {
    IFS=$'\t' read -r LLM TOWER GPUS DTYPE _ < <(
        python -I -c 'import json, sys; print(*json.load(open(sys.argv[1])).values(), sep="\t")' "$WORK/models/models.json")
    case "$DTYPE" in
        bfloat16) PRECISION=bf16 ;;
        float16) PRECISION=fp16 ;;
        *) PRECISION=fp32 ;;
    esac
    CORES=$(env -u OMP_NUM_THREADS nproc)
    RANKS=$GPUS
    if [ "$GPUS" = 0 ]; then
        export DS_ACCELERATOR=cpu
        RANKS=$((CORES > 1 ? 2 : 1))
    fi
}

# Stage 1 and the caches

# What the raw LLM's embeddings are read without: mean and components of training captions.
fit_components() {
    if [ -d "$DATA/reading" ]; then
        return
    fi
    python scripts/quickstart/inputs.py components llm2clip_plugin/data/emoji/train-noto.tar \
        --llm "$LLM" "${READ[@]}" --layer "$LAYER" --compute-dtype "$DTYPE" --output "$DATA/reading"
}

# Sets RAW: how the LLM without stage 1 is read.
raw_reading() {
    RAW=("${READ[@]}" --layer "$LAYER" --post-file "$DATA/reading/llm2clip_post.safetensors")
}

# embed CACHE [SHARDS]: captions, by default all, with the adapter of the cache's seed.
embed() {
    local reading=()
    case "$1" in
        raw)
            fit_components
            raw_reading
            reading=("${RAW[@]}")
            ;;
        plain) ;; # the control "plain": as the LLM comes, the mean over its last hidden state
        *) reading=(--adapter "$DATA/llm/${1#tuned-}/adapter") ;;
    esac
    say "captions through the LLM: $1"
    llm2clip embed "$DATA/all/${2:-*.tar}" --llm "$LLM" ${reading[@]+"${reading[@]}"} \
        --compute-dtype "$DTYPE" --cache "$DATA/cache/$1"
}

# embed_in_halves CACHE: as embed, but two processes at once, because more threads hardly speed up one.
embed_in_halves() {
    local other
    local split
    if [ "$1" = raw ]; then
        fit_components # before two processes want it
    fi
    OMP_NUM_THREADS=$HALF_OF_CORES embed "$1" "${HALVES[1]}" &
    other=$!
    OMP_NUM_THREADS=$HALF_OF_CORES embed "$1" "${HALVES[0]}"
    wait "$other"
    # If both wrote the manifest at the same moment, the shards of one are missing in it.
    for split in train test; do
        grep -q "\"$split-noto\"" "$DATA/cache/$1/manifest.json" || embed "$1"
    done
}

# fit_map SEED: the control "map", a linear map on the raw LLM, fitted to the captions that stage 1 trains on.
fit_map() {
    local captions=llm2clip_plugin/data/emoji/train-noto.tar
    if [ -d "$DATA/cache/map-seed$1" ]; then
        return
    fi
    fit_components
    raw_reading
    say "captions through the LLM: those of stage 1; linear map, seed $1"
    llm2clip embed "$captions" --llm "$LLM" "${RAW[@]}" --compute-dtype "$DTYPE" --cache "$DATA/captions"
    python scripts/quickstart/linear_map.py "$DATA/all" --cache "$DATA/cache/raw" --captions "$DATA/captions" \
        --shard "$captions" --seed "$1" --output "$DATA/cache/map-seed$1"
}

# random_cache: the control "random", random embeddings of the same captions.
random_cache() {
    if [ -d "$DATA/cache/random" ]; then
        return
    fi
    python scripts/quickstart/inputs.py random "$DATA/all" --cache "$DATA/cache/tuned-seed0" --output "$DATA/cache/random"
}

# tune SEED: train an adapter.
tune() {
    local tuning=$DATA/llm/seed$1
    local validation=()
    if [ -f "$tuning/adapter/llm2clip_encoder.json" ]; then
        return
    fi
    if [ "$PRESET" != smoke ]; then # a few seconds
        validation=(--validation llm2clip_plugin/data/emoji/validation-noto.tar --eval-steps "$TUNE_STEPS"
            --evaluation.retrieve short:keywords --evaluation.no-across --evaluation.limit 100)
    fi
    say "stage 1: fine-tuning the LLM contrastively on English captions, seed $1"
    # Captions are the same in every style, so one shard is enough.
    launch scripts/finetune_llm.py llm2clip_plugin/data/emoji/train-noto.tar --llm "$LLM" --output "$tuning" --seed "$1" \
        --deepspeed scripts/zero1.json --languages en --group family \
        --pair-kinds short:long=0.2 short:keywords=0.8 --lists keywords=2:6 \
        "${READ[@]}" --r 16 --alpha 32 --dropout 0 --scale 20 --compute-dtype "$DTYPE" \
        --global-batch "$TUNE_BATCH" --max-steps "$TUNE_STEPS" --lr 1e-3 --warmup-steps 0 --warmup-ratio 0.1 \
        ${validation[@]+"${validation[@]}"}
}

# Stage 2

# train NAME SEED CACHE [OPTION...]: a tower into $OUT/towers/NAME-seedSEED. It is validated on images in one style, but
# for a smoke run, gate.sh, the control of wrong pictures, and the tower before stage 2.
train() {
    local name=$1-seed$2
    local start="launch scripts/train_tower.py"
    local shards=all/train
    local validation=()
    if [ -d "$OUT/towers/$name" ]; then
        return
    fi
    if [ "$PRESET" != smoke ] && [ "$PRESET" != gate ]; then
        validation=(--validation "$DATA/all/validation-noto.tar" --validation-cache "$DATA/cache/$3"
            --eval-steps "$((STEPS / 2))")
    fi
    case "$1" in
        start)
            start="llm2clip train-tower" # one process
            validation=()
            ;;
        shuffled)
            start="llm2clip train-tower"
            validation=()
            shards=shuffled/train
            ;;
        *-twins) shards=all/twins ;; # of scenes.sh
    esac
    say "stage 2: training tower $name"
    # shellcheck disable=SC2086 # words on purpose
    $start --recipe quickstart --deepspeed scripts/zero1.json --output "$OUT/runs/$name" \
        --data "$DATA/$shards-*.tar" --cache "$DATA/cache/$3" --kinds short long \
        --tower "$TOWER" --image-size "$SIZE" --freeze-first-blocks "$FREEZE" --heads.steps "$HEAD_STEPS" --max-steps "$STEPS" \
        --precision "$PRECISION" --seed "$2" ${validation[@]+"${validation[@]}"} "${@:4}"
    # A run ends by exporting its tower.
    mkdir -p "$OUT/towers"
    mv "$OUT/runs/$name/tower" "$OUT/towers/$name"
}

# The tower before stage 2: its heads are fitted, so that it can be asked, and nothing else is trained.
start_tower() {
    train start "$SEED" "tuned-seed$SEED" --max-steps 0 --num-train-epochs 0
}

# The tower before and after stage 2, of one seed: what the page compares.
first_towers() {
    local start
    (
        renice -n 10 -p "$BASHPID" >/dev/null # it fills what the other leaves idle
        OMP_NUM_THREADS=1 start_tower
    ) &
    start=$!
    train tuned "$SEED" "tuned-seed$SEED"
    wait "$start"
}

# Heads on the frozen tower, each concept with the pictures of another: reaches chance.
control() {
    train shuffled 0 tuned-seed0 --freeze-first-blocks 0 --freeze --max-steps 1
}

# towers SEED: of both teachers.
towers() {
    if [ "$PRESET" != smoke ]; then # a smoke run only compares the LLMs
        train raw "$1" raw
    fi
    train tuned "$1" "tuned-seed$1"
}

# controls SEED: towers against the linear map, the raw LLM as it comes, and random embeddings of the same captions.
controls() {
    fit_map "$1"
    train map "$1" "map-seed$1"
    random_cache
    if [ ! -d "$OUT/towers/plain-seed$1" ]; then
        embed plain
    fi
    train plain "$1" plain
    train random "$1" random
    if [ "$PRESET" = smoke ] && [ -n "$LLAVA" ]; then
        train raw "$1" raw # for LLaVA
    fi
}
