#!/usr/bin/env python3
"""uv's variables that say what pip is told here, for uv reads none of pip's settings. What uv is told already stays.

pip config list | uv_as_pip.py      prints ``export NAME=VALUE`` lines for a shell
"""

import ast
import os
import shlex
import sys

# https://docs.astral.sh/uv/reference/environment/: pip's setting -> uv's variable
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}

found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}  # the best version of all indexes, as pip takes it
for line in sys.stdin:  # as global.index-url='https://...'; the later of two counts, as for pip
    setting, _, value = line.strip().partition("=")
    if name := VARIABLES.get(setting.rpartition(".")[2]):
        found[name] = ("," if name == "UV_FIND_LINKS" else " ").join(str(ast.literal_eval(value)).split())
for name, value in found.items():
    if name not in os.environ:
        print(f"export {name}={shlex.quote(value)}")
