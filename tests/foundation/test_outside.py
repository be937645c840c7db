"""Files from outside: types of their fields, and names in messages."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llm2clip_plugin import cli
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.json_files import from_plain, read_json_value


def test_the_kinds_of_annotations():
    @dataclass
    class Sample:
        choice: Literal["a", "b"] = "a"
        maybe: int | None = None
        numbers: list[float] = field(default_factory=list)
        pair: tuple[int, str] = (1, "b")
        path: Path = Path()

    expected = Sample("b", None, [1.0, 2.5], (3, "c"), Path("p"))
    values = {
        "choice": "b",
        "maybe": None,
        "numbers": [1, 2.5],
        "pair": [3, "c"],
        "path": "p",
    }
    assert from_plain(Sample, values, where="x") == expected
    assert from_plain(
        Sample, {"choice": "a"}, where="x", default=expected
    ) == dataclasses.replace(expected, choice="a")
    for values, message in (
        ({"choice": "c"}, "choice is 'c', expected one of 'a', 'b'"),
        ({"maybe": 1.5}, "maybe is 1.5, expected int"),
        ({"pair": [3]}, "pair has 1 values, expected 2"),
        ({"other": 3}, "unknown fields .'other'"),
        ({"numbers": [1, "2"]}, r"numbers\[1\] is '2', expected float"),
    ):
        with pytest.raises(ContractError, match=f"x.*{message}"):
            from_plain(Sample, values, where="x")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": \xff}', b"", b'{"a": 1'])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ContractError, match=f"{tmp_path / 'x.json'} is not valid JSON"):
        read_json_value(tmp_path / "x.json")


def test_a_command_prints_names_in_its_error_as_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["use", f"{tmp_path}/\x1b[2Jtower"]) == 2
    error = capsys.readouterr().err
    assert "\\x1b[2Jtower" in error
    assert "\x1b" not in error
    assert cli.main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err
