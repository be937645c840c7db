#!/usr/bin/env python3
"""uv's variables that say what pip is told here: indexes, folders of wheels, constraints, certificates.

pip config list | uv_as_pip.py      prints ``export NAME=VALUE`` lines for a shell

uv reads none of pip's settings (https://docs.astral.sh/uv/pip/compatibility/). What uv is told already stays.
"""

import ast
import os
import shlex
import sys

# https://docs.astral.sh/uv/reference/environment/: pip's setting -> uv's variable, and what separates several values
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}


def variables(lines: list[str]) -> dict[str, str]:
    """Name -> value, of lines as ``global.index-url='https://...'``; the later of two counts, as for pip."""
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # the best version of all indexes, as pip takes it
    for line in lines:
        setting, _, value = line.partition("=")
        name, separator = VARIABLES.get(setting.rpartition(".")[2], ("", ""))
        if name:
            found[name] = separator.join(str(ast.literal_eval(value)).split())
    return found


if __name__ == "__main__":
    for name, value in variables(sys.stdin.read().splitlines()).items():
        if name not in os.environ:
            print(f"export {name}={shlex.quote(value)}")
