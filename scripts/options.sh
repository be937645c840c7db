# What scripts with options share. Sourced.

fail() { echo "error: $*" >&2; exit 2; }
say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*" >&2; }

# read_options "NAME[=COUNT]..." "$@": --some-name VALUE sets SOME_NAME; with a COUNT of values, an array; with COUNT 0, to yes.
# ARGUMENTS gets what is no option, EXTRA what comes after --
read_options() {
    local known=" $1 " name count
    shift
    ARGUMENTS=() EXTRA=()
    while [ $# -gt 0 ]; do
        case "$1" in
            --) EXTRA=("${@:2}"); break ;;
            -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
            [!-]*) ARGUMENTS+=("$1") ;;
            *)
                [[ $known =~ " ${1#--}"(=([0-9]))?" " ]] || fail "unknown option $1; see $0 --help"
                count=${BASH_REMATCH[2]:-1} name=${1#--} name=${name//-/_} name=${name^^}
                [[ $# -gt $count && " ${*:2:count}" != *" --"* ]] || fail "$1 needs $count value(s)"
                case "$count" in
                    0) printf -v "$name" yes ;;
                    1) printf -v "$name" %s "$2" ;;
                    *) local -n values=$name; values=("${@:2:count}"); unset -n values ;;
                esac
                shift "$count" ;;
        esac
        shift
    done
}

one_of() { # one_of OPTION VALUE KNOWN...
    [[ " ${*:3} " == *" $2 "* ]] || fail "unknown $1 $2; known: $(printf '%s, ' "${@:3}" | sed 's/, $//')"
}

# run_module PYTHON MODULE ARGUMENT...: as `PYTHON -m MODULE`, which would import files of the working directory, too
RUN_MODULE='import sys; sys.path[:] = filter(None, sys.path); import runpy; del sys.argv[0]; runpy.run_module(sys.argv[0], None, "__main__", True)'
run_module() { "$1" -u -c "$RUN_MODULE" "${@:2}"; }
