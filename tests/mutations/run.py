#!/usr/bin/env python3
"""Plant each bug of planted.txt in a copy of the tree, one at a time, and run the test that must
fail.

    tests/mutations/run.py              all of them: `make mutations`
    tests/mutations/run.py holm ema     those whose name contains one of the words

A bug is caught if its test fails; pytest's other statuses (no such test, an error while collecting)
are not, nor is a test that has not ended after SECONDS, or that stops at a name that the planted
text misspells. The tests must pass without a bug, which is checked first. Exits with 1 if a bug
survives.

Each test runs in a process that is forked from one that has imported the libraries, and nothing of
the project; what it forks in turn, from one that it starts. There is one copy for each core.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import pytest
from planted import PLANTED, Bug

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "deepspeed",
    "deepspeed.runtime.engine",
    "numpy",
    "peft",
    "safetensors.torch",
    "torch",
    "transformers",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
)
FORKED = multiprocessing.get_context("forkserver")
FAILED = 1  # pytest's status if a test failed
SECONDS = 600  # of pytest on one bug's test, beside other work
COPIES = 4  # at most; each test needs about 1 GB
MISSPELLED = re.compile(r"^E +((?:Name|Syntax|UnboundLocal)Error: .*)", re.MULTILINE)


def copy_tree(folder: Path) -> None:
    """Every file that git does not ignore, and links to the environments."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for environment in (".venv", ".venv-llava"):
        if (ROOT / environment).exists() and not (folder / environment).exists():
            (folder / environment).symlink_to((ROOT / environment).resolve())


def run_pytest(
    folder: Path, tests: Sequence[str], log: Path, write_bytecode: bool
) -> None:
    """In a new process: pytest in the copy, whose exit status is written next to ``log``."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    # a bug's would look valid for a file restored in the same second
    sys.dont_write_bytecode = not write_bytecode
    code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))
    log.with_suffix(".code").write_text(str(code))


def status(
    folder: Path, tests: Sequence[str], *, write_bytecode: bool = False
) -> tuple[int | None, str]:
    """pytest's exit status on these tests of the copy, None if they did not end, and what it
    printed."""
    log = folder.with_suffix(".log")
    # not the process's: another thread that starts one may take it
    ended = log.with_suffix(".code")
    ended.unlink(missing_ok=True)
    process = FORKED.Process(
        target=run_pytest, args=(folder, tests, log, write_bytecode)
    )
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    code = int(ended.read_text()) if ended.is_file() else None
    return code, log.read_text(encoding="utf-8", errors="replace")


def survives(folder: Path, bug: Bug) -> bool:
    """Plant a bug, run its test and print what came of it."""
    started = time.monotonic()
    path = folder / bug.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(bug.plant(whole), encoding="utf-8")
    try:
        code, said = status(folder, [bug.test])
    finally:
        path.write_text(whole, encoding="utf-8")
    misspelled = MISSPELLED.search(said)
    # pytest's summary names what failed
    caught = code == FAILED and f" {bug.test}" in said and not misspelled
    verdict = "caught"
    if not caught:
        verdict = f"SURVIVED (pytest {'did not end' if code is None else code})"
    if misspelled:
        verdict = f"NOT A BUG BUT {misspelled[1]}"
    seconds = time.monotonic() - started
    # one write: other threads print, too
    print(f"{seconds:6.1f} s  {verdict:9}  {bug.name}\n", end="", flush=True)
    if code != 0 and not caught:
        print(said[-2000:], file=sys.stderr)
    return not caught


def passing(folders: Sequence[Path], bugs: Sequence[Bug]) -> None:
    """Exit with an error if a test of these bugs fails without one; each copy runs the tests of
    some files."""
    files = sorted({bug.test.split("::")[0] for bug in bugs})

    def run(number: int) -> tuple[int | None, str]:
        mine = set(files[number :: len(folders)])
        tests = sorted({bug.test for bug in bugs if bug.test.split("::")[0] in mine})
        # as scripts/test.sh: a process that has imported LLaVA has its changes of other libraries
        with_llava = [test for test in tests if test.startswith("tests/llava/")]
        others = [test for test in tests if test not in with_llava]
        for part in filter(None, (with_llava, others)):
            code, said = status(folders[number], part, write_bytecode=True)
            if code != 0:
                return code, said
        return 0, ""

    with ThreadPoolExecutor(len(folders)) as threads:
        for code, said in threads.map(run, range(len(folders))):
            if code != 0:
                sys.exit(
                    f"error: the tests fail without a planted bug:\n{said[-3000:]}"
                )


def is_named(bug: Bug, words: Sequence[str]) -> bool:
    return any(word in bug.name for word in words)


def main(words: Sequence[str]) -> int:
    """Run those whose name contains one of ``words``; all without any."""
    chosen = [bug for bug in PLANTED if not words or is_named(bug, words)]
    if not chosen:
        sys.exit(
            f"error: no planted bug's name contains {' or '.join(words)}; "
            f"see tests/mutations/planted.txt"
        )
    FORKED.set_forkserver_preload(list(LIBRARIES))
    copies = min(COPIES, len(chosen), os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        folders = [Path(scratch) / f"tree-{number}" for number in range(copies)]
        for folder in folders:
            copy_tree(folder)
        passing(folders, chosen)
        free: SimpleQueue[Path] = SimpleQueue()
        for folder in folders:
            free.put(folder)

        def survived(bug: Bug) -> bool:
            folder = free.get()
            try:
                return survives(folder, bug)
            finally:
                free.put(folder)

        with ThreadPoolExecutor(copies) as threads:
            count = sum(threads.map(survived, chosen))
    print(f"{len(chosen) - count} of {len(chosen)} caught")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
