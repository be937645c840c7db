"""Every path of a test that a command or a page names is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED_IN = (
    *("Makefile", "CONTRIBUTING.md", "pyproject.toml", ".ci/run"),
    *("scripts/test.sh", "scripts/check_gpu.sh", "tests/mutations/planted.txt"),
)
# a path below tests, perhaps with {one,another} in it
PATH = re.compile(r"\btests/[\w./]*\w(?:\{([\w,]+)\}\.py)?/?")


def paths_in(text: str) -> Iterator[str]:
    for match in PATH.finditer(text):
        path = match[0]
        if match[1] is None:
            yield path
            continue
        before, _, after = path.partition("{" + match[1] + "}")
        for name in match[1].split(","):
            yield f"{before}{name}{after}"


def makefile_paths(text: str) -> Iterator[str]:
    """Those that ``$(addprefix tests/, ...)`` gives."""
    for names in re.findall(r"\$\(addprefix tests/,([^)]*)\)", text):
        for name in names.replace("\\", " ").split():
            yield f"tests/{name}"


@pytest.mark.parametrize("name", NAMED_IN)
def test_paths_of_tests_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    missing = [path for path in paths_in(text) if not (ROOT / path).exists()]
    assert missing == []


def test_paths_of_the_makefile_exist() -> None:
    paths = list(makefile_paths((ROOT / "Makefile").read_text(encoding="utf-8")))
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_paths_are_read() -> None:
    text = "run tests/llava/a_{b,c}.py tests/text, then `tests/x/test_y.py::test_z` in tests/data."
    assert list(paths_in(text)) == [
        "tests/llava/a_b.py",
        "tests/llava/a_c.py",
        "tests/text",
        "tests/x/test_y.py",
        "tests/data",
    ]
