# What quickstart.sh shows while it works: one line a stage, all in one form. Sourced.
#
#   [3/9] stage 1: fine-tuning the LLM on captions                   1:52 elapsed, about 7 min left
#
# What a stage prints goes to a file in LOGS; if it fails, the end of the file is shown.

STAGES=()     # names of the stages, in order
EXPECTED=()   # about how many seconds each takes on two cores
DONE=0        # stages that are finished
SPENT=0       # seconds that the finished ones took, and
FORESEEN=0    # the seconds expected of them: how fast this machine is
RUNNING=      # file that exists while a stage runs
LOG=          # of the stage that runs
BEGAN=0       # SECONDS when it began

plan() { # plan NAME SECONDS
    STAGES+=("$1")
    EXPECTED+=("$2")
}

at_this_speed() { # at_this_speed EXPECTED: seconds, as this machine has taken so far
    if ((FORESEEN > 0)); then
        echo $(($1 * SPENT / FORESEEN))
    else
        echo "$1"
    fi
}
seconds_left() { # of the whole run; about
    local place this later=0
    this=$(($(at_this_speed "${EXPECTED[DONE]}") - (SECONDS - BEGAN)))
    for ((place = DONE + 1; place < ${#STAGES[@]}; place++)); do
        later=$((later + EXPECTED[place]))
    done
    echo $(((this > 0 ? this : 0) + $(at_this_speed "$later")))
}

progress_line() {
    local left about
    left=$(seconds_left)
    about="about $(((left + 59) / 60)) min left"
    if ((left < 50)); then
        about="less than a minute left"
    fi
    printf '[%d/%d] %-58s %2d:%02d elapsed, %s' $((DONE + 1)) ${#STAGES[@]} "${STAGES[DONE]}" \
        $((SECONDS / 60)) $((SECONDS % 60)) "$about"
}

repeat_line() { # repeat_line FILE: while there is the file, on a terminal every second in place, else every minute
    local seconds=0
    while sleep 1 >/dev/null 2>&1 && [ -e "$1" ] && kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 1))
        if [ -t 2 ]; then
            printf '\r\033[K%s' "$(progress_line)" >&2
        elif ((seconds % 60 == 0)); then
            printf '%s\n' "$(progress_line)" >&2
        fi
    done
}

stage() { # stage COMMAND...: run the next stage of the plan
    local name=${STAGES[DONE]} took expected=${EXPECTED[DONE]}
    mkdir -p "$LOGS"
    LOG=$LOGS/$(printf '%02d' $((DONE + 1)))-$(printf %s "${name%%:*}" | tr -cs 'A-Za-z0-9' -).log
    BEGAN=$SECONDS
    printf '%s' "$(progress_line)" >&2
    [ -t 2 ] || echo >&2
    RUNNING=$LOG.running
    touch "$RUNNING"
    repeat_line "$RUNNING" 9>&- &
    disown
    "$@" >>"$LOG" 2>&1 </dev/null
    rm -f "$RUNNING"
    [ ! -t 2 ] || printf '\r\033[K%s\n' "$(progress_line)" >&2
    took=$((SECONDS - BEGAN))
    if ((took * 5 >= expected)); then # else it was finished before
        printf '%s\t%s\n' "$took" "$name" >>"$LOGS/seconds.tsv"
        SPENT=$((SPENT + took))
        FORESEEN=$((FORESEEN + expected))
    fi
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
