"""scripts/environments.sh: packages are installed with uv as pip is configured, and with pip where uv fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "uv_as_pip.py"
# says what it is called with; $FAILS: the module that fails
PYTHON = """#!/bin/bash
echo "$*" >>"$LOG"
[[ "$2" != "$FAILS" ]] || exit 1
"""


@pytest.mark.parametrize(
    "told, wanted",
    [
        ("", {"UV_INDEX_STRATEGY": "unsafe-best-match"}),
        ("global.index-url='https://mirror.example/simple'\n", {"UV_DEFAULT_INDEX": "https://mirror.example/simple"}),
        (
            "global.find-links='/a'\nglobal.constraint='/c.txt'\n:env:.find-links='/b /c d'\n",
            {"UV_FIND_LINKS": "/b,/c,d", "UV_CONSTRAINT": "/c.txt"},
        ),
        (
            "install.extra-index-url='\\nhttps://a.example\\nhttps://b.example'\n",
            {"UV_INDEX": "https://a.example https://b.example"},
        ),
        ("global.timeout='60'\nglobal.quiet='1'\n", {"UV_HTTP_TIMEOUT": "60"}),
        (
            "global.proxy='http://kept.example'\n",
            {"ALL_PROXY": "socks5://own.example"},
        ),  # the user's own variable stays
    ],
)
def test_uv_is_told_what_pip_is_told(told: str, wanted: dict[str, str]):
    shell = f'eval "$("{sys.executable}" "{SCRIPT}")"; env'
    own = {"PATH": os.environ["PATH"], "ALL_PROXY": "socks5://own.example"} if "ALL_PROXY" in wanted else {}
    environment = {"PATH": os.environ["PATH"], **own}
    done = subprocess.run(
        ["bash", "-c", shell], input=told, env=environment, capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert wanted.items() <= found.items()
    known = {"UV_INDEX_STRATEGY", *wanted}
    assert {name for name in found if name.startswith("UV_")} <= known


@pytest.mark.parametrize("fails", ["nothing", "uv", "pip"])
def test_pip_installs_where_uv_cannot(tmp_path: Path, fails: str):
    python = tmp_path / "made" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    shell = f'set -euo pipefail; ROOT={ROOT}; . {ROOT}/scripts/environments.sh; install {tmp_path}/made --no-deps "a b"'
    log = tmp_path / "log"
    environment = {"PATH": os.environ["PATH"], "LOG": str(log), "FAILS": fails}
    done = subprocess.run(["bash", "-c", shell], env=environment, check=False)
    called = log.read_text().splitlines()
    with_uv, with_pip = f"-m uv pip install -q --python {python} --no-deps a b", "-m pip install -q --no-deps a b"
    # without pip's configuration, uv does not guess
    expected = {"nothing": (True, False), "uv": (True, True), "pip": (False, True)}
    assert (with_uv in called, with_pip in called) == expected[fails]
    assert done.returncode == (fails == "pip")
