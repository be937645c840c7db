# What quickstart.sh shows while it works: one line a stage, all in one form. Sourced.
#
#   [3/7] stage 1: fine-tuning the LLM on captions    [########------------] 5/12 steps, 8.1 s each  1:52 elapsed, about 7 min left
#
# progress.py makes the line. What a stage prints goes to a file in LOGS; if it fails, the end of the file is shown.

STAGES=()     # names of the stages, in order
PLAN=         # lines of progress.py's plan.tsv
DONE=0        # stages that are finished
RUNNING=      # file that exists while a stage runs
LOG=          # of the stage that runs
BEGAN=0       # SECONDS when it began
ANY_PYTHON=$(find_python)

# plan NAME FIXED WORK [BARS [REPEATS]]: seconds that do not depend on the speed of matrix products; seconds of the rest at 100
# GFLOPS; how many progress bars the log has; of how many units only one costs time.
plan() {
    STAGES+=("$1")
    PLAN+=$(printf '%s\t' "${@:1:3}" "${4:-0}")${5:-1}$'\n'
}

progress() { # progress [OPTION...]: the line of the stage that runs
    local now
    now=$(date +%s)
    "$ANY_PYTHON" "$ROOT/scripts/quickstart/progress.py" --folder "$LOGS" --stage "$DONE" --log "$LOG" --log-start "$LOG_START" \
        --speed "${WORK:-.}/models/models.json" --began $((now - SECONDS + BEGAN)) --run-began $((now - SECONDS)) "$@"
}

stage() { # stage COMMAND...: run the next stage of the plan
    local name=${STAGES[DONE]} took
    mkdir -p "$LOGS"
    if [ "$DONE" = 0 ]; then
        printf %s "$PLAN" >"$LOGS/plan.tsv"
        : >"$LOGS/took.tsv"
    fi
    LOG=$LOGS/$(printf '%02d' $((DONE + 1)))-$(printf %s "${name%%:*}" | tr -cs 'A-Za-z0-9' -).log
    touch "$LOG"
    LOG_START=$(wc -c <"$LOG") # a run that was resumed goes on in the same file
    BEGAN=$SECONDS
    RUNNING=$LOG.running
    touch "$RUNNING"
    if [ -t 2 ]; then
        printf '%s' "$(progress)" >&2
    else
        progress >&2
    fi
    progress --running "$RUNNING" --shell $$ 9>&- &
    disown
    "$@" >>"$LOG" 2>&1 </dev/null
    rm -f "$RUNNING"
    [ ! -t 2 ] || printf '\r\033[K%s\n' "$(progress)" >&2
    took=$((SECONDS - BEGAN))
    printf '%s\t%s\n' "$DONE" "$took" >>"$LOGS/took.tsv"
    printf '%s\t%s\n' "$took" "$name" >>"$LOGS/seconds.tsv"
    DONE=$((DONE + 1))
    LOG=
}

trap_ends() { # of the script: by itself, by Ctrl-C, by a signal
    exec 3>&2
    trap end_of_script EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}
end_of_script() {
    local status=$? job
    rm -f "$RUNNING"
    for job in $(jobs -p); do # a part that runs while another does
        pkill -P "$job" 2>/dev/null || true
        kill "$job" 2>/dev/null || true
    done
    if [ "$status" = 0 ] || [ -z "$LOG" ]; then
        return
    fi
    exec 2>&3 # inside a stage it is the log
    echo >&2
    if [ "$status" -gt 128 ]; then # by a signal
        echo "stopped in '${STAGES[DONE]}'; rerun the same command to resume" >&2
        return
    fi
    tail -n 20 "$LOG" >&2
    echo "error: '${STAGES[DONE]}' failed, as above; everything that it printed is in $LOG" >&2
    echo "Rerun the same command to resume." >&2
}
