"""The forked programs end as real ones do, and with their callers."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
from forked_python import programs


def python(*words: str, **options) -> subprocess.CompletedProcess[str]:
    """``python WORDS``."""
    return subprocess.run([programs() / "python", *words], capture_output=True, text=True, check=False, **options)


def test_words_environment_folder_and_status_are_the_callers(tmp_path: Path):
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['ASKED'], os.getpid()); sys.exit(3)"
    done = python("-c", code, "a b", cwd=tmp_path, env={**os.environ, "ASKED": "for"})
    assert done.returncode == 3 and done.stdout.startswith(f"['-c', 'a b'] {tmp_path} for ")
    (tmp_path / "script.py").write_text("import beside\nraise SystemExit(beside.TOLD)\n")
    (tmp_path / "beside.py").write_text("TOLD = 'error: told'\n")
    done = python(str(tmp_path / "script.py"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: told\n")
    assert python("-", input="print(5)").stdout == "5\n"  # by a real one


def test_the_libraries_are_there_from_the_start():
    code = "import gc, sys, forked_libraries as f; print(gc.get_freeze_count() > 1e5, {*f.LIBRARIES} - {*sys.modules})"
    assert python("-c", code).stdout == "True set()\n"


def test_it_ends_with_its_caller(tmp_path: Path):
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    caller = subprocess.Popen([programs() / "python", "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    caller.kill()
    caller.wait()
    assert psutil.wait_procs([process], timeout=60)[1] == []
