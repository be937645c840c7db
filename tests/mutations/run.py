#!/usr/bin/env python3
"""Plant each bug of planted.py in a copy of the tree, one at a time, and run the test that must fail.

    tests/mutations/run.py              all of them: `make mutations`
    tests/mutations/run.py holm ema     those whose name contains one of the words

A bug is caught if its test fails; pytest's other statuses (no such test, an error while collecting) are not. The tests
must pass without a bug, which is checked first. Exits with 1 if a bug survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from planted import PLANTED

ROOT = Path(__file__).resolve().parents[2]
FAILED = 1  # pytest's status if a test failed


def copy_tree(folder: Path) -> None:
    """Every file that git does not ignore, and links to the environments."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for environment in (".venv", ".venv-llava"):
        if (ROOT / environment).exists() and not (folder / environment).exists():
            (folder / environment).symlink_to((ROOT / environment).resolve())


def status(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status on these tests of the copy, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    variables = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main(words: Sequence[str]) -> int:
    """Run those whose name contains one of ``words``; all without any."""
    chosen = [bug for bug in PLANTED if not words or any(word in bug.name for word in words)]
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        copy_tree(folder := Path(scratch))
        code, said = status(folder, sorted({bug.test for bug in chosen}))
        if code:
            sys.exit(f"error: the tests fail without a planted bug:\n{said[-3000:]}")
        for bug in chosen:
            started, path = time.monotonic(), folder / bug.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(bug.plant(whole), encoding="utf-8")
            code, said = status(folder, [bug.test])
            path.write_text(whole, encoding="utf-8")
            if code != FAILED:
                survived.append(bug.name)
            verdict = "caught" if code == FAILED else f"SURVIVED (pytest {code})"
            print(f"{time.monotonic() - started:6.1f} s  {verdict:9}  {bug.name}", flush=True)
            if code not in (0, FAILED):
                print(said[-2000:], file=sys.stderr)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
