"""The command table: help of each command, doctor, threads."""

import os
import subprocess
import sys

import pytest

from llm2clip_plugin import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("example:\n  llm2clip ")
    assert f"\nusage: llm2clip {name} " in out
    assert sum(line.startswith("  -") for line in out.splitlines()) <= 15, (
        "the others belong to --help-all"
    )


@pytest.mark.parametrize(
    "words",
    [["search", "t", "d", "\udcff"], ["data", "make", "p", "--output=caf\udce9"]],
)
def test_words_that_are_not_utf8_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    printed_word = repr(os.fsencode(words[-1]))
    assert message.startswith(
        f"error: {printed_word} on the command line is not UTF-8; "
    )
    assert message.count("\n") == 1


def test_doctor_reports_problems_and_fixes(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert status in (0, 1)
    for subject in (
        "python",
        "torch",
        "deepspeed launcher",
        "C++ compiler",
        "accelerator",
        "open files",
    ):
        assert subject in out


def test_ranks_of_one_machine_share_its_cores(tmp_path) -> None:
    """Under a launcher a command takes one thread a rank, unless the user has said how many."""
    code = (
        "import os, llm2clip_plugin.cli as c; c.run('doctor', []); "
        "print(os.environ['OMP_NUM_THREADS'])"
    )
    for given, threads in (({}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")):
        env = {
            name: value
            for name, value in os.environ.items()
            if name != "OMP_NUM_THREADS"
        }
        env |= {"WORLD_SIZE": "2", "RANK": "0", **given}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split()[-1] == threads


def test_threads_wait_passively_in_one_process_too() -> None:
    """OpenMP reads the policy when torch is imported: until then it is set, unless the user has set
    another."""
    code = """import os, sys
import llm2clip_plugin.cli as c
c.read_options = lambda *_: print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
c.load = lambda _: lambda _: 0
c.run("train-tower", [])"""
    for given, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("OMP_WAIT_POLICY", "WORLD_SIZE")
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [policy, "False"]


def test_the_source_that_is_saved_with_towers_needs_no_pillow() -> None:
    code = (
        "import runpy, sys; sys.modules['PIL'] = None; "
        "runpy.run_module('llm2clip_plugin.vision.wrapped')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LEFT = """import atexit, time
from torch.utils.data import DataLoader
from llm2clip_plugin.cli import leave
next(loader := iter(DataLoader(range(9), num_workers=2)))
atexit.register(time.sleep, 1)  # in which torch would notice
leave(0)
"""


def test_a_loader_that_is_killed_at_the_end_is_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
