#!/usr/bin/env python3
"""Plant each bug of planted.txt in a copy of the tree, one at a time, and run the test that must fail.

    tests/mutations/run.py              all of them: `make mutations`
    tests/mutations/run.py holm ema     those whose name contains one of the words

A bug is caught if its test fails; pytest's other statuses (no such test, an error while collecting) are not. The tests
must pass without a bug, which is checked first. Exits with 1 if a bug survives.

Each test runs in a process that is forked from one that has imported the libraries, and nothing of the project.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest
from planted import PLANTED, Bug

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    *("deepspeed", "deepspeed.runtime.engine", "numpy", "peft", "safetensors.torch", "torch", "transformers"),
    *("transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama"),
)
FORKED = multiprocessing.get_context("forkserver")
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


def start_server() -> str:
    """The address of a process that imports the libraries; all others are forked from it, those of tests as well."""
    FORKED.set_forkserver_preload(list(LIBRARIES))
    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]


def run_pytest(folder: Path, tests: Sequence[str], log: Path, server: str, write_bytecode: bool) -> None:
    """In a new process: pytest in the copy; the process ends with its exit status."""
    forkserver._forkserver._forkserver_address = server  # type: ignore[attr-defined]
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined, method-assign]
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = not write_bytecode  # a bug's would look valid for a file restored in the same second
    sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])))


def status(folder: Path, tests: Sequence[str], server: str, *, write_bytecode: bool = False) -> tuple[int, str]:
    """pytest's exit status on these tests of the copy, and what it printed."""
    log = folder.with_suffix(".log")
    process = FORKED.Process(target=run_pytest, args=(folder, tests, log, server, write_bytecode))
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text(encoding="utf-8", errors="replace")


def survives(folder: Path, bug: Bug, server: str) -> bool:
    """Plant a bug, run its test and print what came of it."""
    started, path = time.monotonic(), folder / bug.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(bug.plant(whole), encoding="utf-8")
    code, said = status(folder, [bug.test], server)
    path.write_text(whole, encoding="utf-8")
    caught = code == FAILED and f" {bug.test}" in said  # pytest's summary names what failed
    verdict = "caught" if caught else f"SURVIVED (pytest {code})"
    print(f"{time.monotonic() - started:6.1f} s  {verdict:9}  {bug.name}", flush=True)
    if code and not caught:
        print(said[-2000:], file=sys.stderr)
    return not caught


def main(words: Sequence[str]) -> int:
    """Run those whose name contains one of ``words``; all without any."""
    chosen = [bug for bug in PLANTED if not words or any(word in bug.name for word in words)]
    server = start_server()
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        copy_tree(folder := Path(scratch) / "tree")
        code, said = status(folder, sorted({bug.test for bug in chosen}), server, write_bytecode=True)
        if code:
            sys.exit(f"error: the tests fail without a planted bug:\n{said[-3000:]}")
        survived = sum(survives(folder, bug, server) for bug in chosen)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
