#!/usr/bin/env bash
# Writes the exact versions in which the environments are installed, scripts/environments/locked/NAME.txt, from pyproject.toml and
# scripts/environments/NAME.txt; and from these, the versions that LLaVA was tried with (llava_integration/plug/compat/tried.json).
#   scripts/lock.sh                                   after a change of what is asked for; the other versions stay
#   scripts/lock.sh --upgrade                         the newest versions (make lock)
#   scripts/lock.sh --upgrade-package transformers    the newest of one package; any option of `uv pip compile`
# A list serves Python 3.10 and newer on any system. Needs .venv (make setup) and a package index.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
cd "$ROOT"
. scripts/environments.sh
OPTIONS=("$@")
HELD=("torch<2.14" "torchvision<0.29") # what was tested; raise it when scripts/test.sh --newest is green with a newer one
BUILDERS=(hatchling editables uv)      # what installs, and what builds this package

# lock NAME INPUT...: INPUT as for `uv pip compile`, and lines on stdin. With the index and certificates of pip's settings, but
# without its folders of wheels and its constraints, which are this machine's.
lock() (
    list=$LOCKED/$1.txt
    export_uv_variables .venv/bin/python
    unset UV_FIND_LINKS UV_CONSTRAINT
    .venv/bin/python -m uv pip compile -q --universal --python-version 3.10 --no-annotate \
        --custom-compile-command "scripts/lock.sh" --constraint <(printf '%s\n' "${HELD[@]}") \
        "${OPTIONS[@]}" "${@:2}" --output-file "$list" -
    # torch brings the GPU libraries that it was built for, and none on a CPU
    sed -i -E '/^(nvidia|cuda|triton)\b/d' "$list"
    echo "$list: $(grep -c == "$list") lines" >&2
)

mkdir -p "$LOCKED"
# shellcheck disable=SC2086 # words on purpose
printf '%s\n' "${BUILDERS[@]}" ${QUICKSTART_PACKAGES[*]//--no-deps/} | lock training pyproject.toml --extra train --extra dev
for input in scripts/environments/*.txt; do
    printf '%s\n' "${BUILDERS[@]}" |
        lock "$(basename "$input" .txt)" "$input" pyproject.toml --extra tower --override <(sed -n 's/^# override //p' "$input")
done
.venv/bin/python scripts/locked.py
