# What scripts with options share. Sourced.

fail() {
    echo "error: $*" >&2
    exit 2
}

say() {
    printf '\n[%3d s] %s\n' "$SECONDS" "$*" >&2
}

# read_options "NAME[=COUNT]..." "$@": --some-name VALUE sets SOME_NAME; with a COUNT of values, an array; with COUNT 0, to yes.
# ARGUMENTS gets what is no option, EXTRA what comes after --
read_options() {
    local known=" $1 "
    local name
    local count
    shift
    ARGUMENTS=()
    EXTRA=()
    while [ $# -gt 0 ]; do
        case "$1" in
            --)
                EXTRA=("${@:2}")
                break
                ;;
            -h | --help)
                sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" # the comment at the script's top
                exit 0
                ;;
            [!-]*) ARGUMENTS+=("$1") ;;
            *)
                [[ $known =~ " ${1#--}"(=([0-9]))?" " ]] || fail "unknown option $1; see $0 --help"
                count=${BASH_REMATCH[2]:-1}
                [[ $# -gt $count && " ${*:2:count}" != *" --"* ]] || fail "$1 needs $count value(s)"
                name=${1#--}
                name=${name//-/_}
                set_option "${name^^}" "${@:2:count}"
                shift "$count"
                ;;
        esac
        shift
    done
}

# set_option NAME [VALUE...]: to yes without a value, to one, or to an array of several.
set_option() {
    case $# in
        1) printf -v "$1" yes ;;
        2) printf -v "$1" %s "$2" ;;
        *)
            local -n values=$1
            # shellcheck disable=SC2034 # it is another name of the option's variable
            values=("${@:2}")
            ;;
    esac
}

# one_of OPTION VALUE KNOWN...: fails unless the value is one of the known ones.
one_of() {
    [[ " ${*:3} " == *" $2 "* ]] || fail "unknown $1 $2; known: $(printf '%s, ' "${@:3}" | sed 's/, $//')"
}

# run_module PYTHON MODULE ARGUMENT...: as `PYTHON -m MODULE`, which would import files of the working directory, too.
RUN_MODULE='
import runpy
import sys

sys.path[:] = filter(None, sys.path)
del sys.argv[0]
runpy.run_module(sys.argv[0], None, "__main__", True)
'
run_module() {
    "$1" -u -c "$RUN_MODULE" "${@:2}"
}
