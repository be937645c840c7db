"""Bad inputs, planted one at a time: one line says what was given, what was expected and where;
nothing is written.

The cases are in tests/faults/bad/, a file a subject. A command that waits forever is a failure,
too.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad import folders, language_models, runs, tables, towers
from bad.planted import Case
from planted_faults import World, contents

from llm2clip_plugin.cli import main

CASES = [
    *tables.CASES,
    *folders.CASES,
    *language_models.CASES,
    *towers.CASES,
    *runs.CASES,
]
SECONDS = 120  # of a command; far more than any takes


@pytest.fixture(autouse=True)
def ends_in_time() -> Iterator[None]:
    """A command that waits for a pipe or reads without end becomes a failure."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"the command still ran after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def words_of(case: Case, folder: Path, world: World) -> list[str]:
    """The command's words; ``\\xNN`` is a byte, as a shell passes it."""
    command = case.command.replace("{t}", str(folder)).replace("{w}", str(world.folder))
    return [os.fsdecode(_unescaped(word)) for word in command.split()]


def _unescaped(word: str) -> bytes:
    return re.sub(
        rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), word.encode()
    )


def pattern(case: Case, folder: Path, world: World) -> str:
    says = case.says.replace("{t}", str(folder)).replace("{w}", str(world.folder))
    return ".*".join(re.escape(part) for part in says.split("..."))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_line_says_what_is_wrong(
    case: Case,
    furnished: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for plant in case.plants:
        plant(tmp_path, furnished)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LLM2CLIP_HOME", str(tmp_path / "home"))
    before = contents(furnished.folder)
    planted = contents(tmp_path)
    capsys.readouterr()
    try:
        status = main(words_of(case, tmp_path, furnished))
    except SystemExit as ended:
        status = ended.code
    output = capsys.readouterr()
    assert status == case.status, output
    assert "Traceback" not in output.err
    if case.status == 2:
        errors = [
            line for line in output.err.splitlines() if line.startswith("error: ")
        ]
        assert len(errors) == 1, output.err
        lines = [errors[0].removeprefix("error: ")]
        written = contents(tmp_path).keys() - planted.keys()
        assert written == set(case.leaves), (
            "files were written before the command was refused"
        )
    else:
        lines = [*output.out.splitlines(), *output.err.splitlines()]
    expected = pattern(case, tmp_path, furnished)
    assert any(re.fullmatch(expected, line) for line in lines), (
        f"expected {case.says}\n{output}"
    )
    assert contents(furnished.folder) == before


def test_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
