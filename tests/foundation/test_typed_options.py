"""What a command line is refused for is a ValueError of one line, whatever the width of the terminal."""

import io
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from llm2clip_plugin.typed_options import parse_typed


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 0.1  # peak learning rate
    kind: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr {self.lr} must not be negative:\n  it is a rate that is long enough to be wrapped")


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: str = ""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.path == "file://":
            raise ValueError("path file:// is empty")


@dataclass(frozen=True, kw_only=True)
class Required:
    path: str  # folder of images


@pytest.mark.parametrize("columns", ["30", "120"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of the frame around the message
@pytest.mark.parametrize(
    ("form", "words", "message"),
    [
        (
            Outer,
            ["--inner.lr", "-1"],
            r"lr -1.0 must not be negative:\n  it is a rate that is long enough to be wrapped",
        ),
        (Outer, ["--path", "file://"], r"path file:// is empty"),
        (Outer, ["--inner.lr", "x"], r"--inner\.lr: could not convert string to float: 'x'; see prog --help"),
        (Outer, ["--inner.lrr", "1"], r"unrecognized options: --inner\.lrr, 1; did you mean --inner\.lr\?"),
        (Outer, ["--inner.kind", "fp8"], r"invalid choice 'fp8' for argument '--inner\.kind'.*; see prog --help"),
        (Outer, ["--path"], r"missing value for argument '--path'.*; see prog --help"),
        (Required, [], r".*--path STR.* folder of images.*; see prog --help"),
    ],
)
def test_a_refusal_is_one_line(
    form: type, words: list[str], message: str, columns: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setattr("sys.stderr", printed := io.StringIO())
    with pytest.raises(ValueError) as refused:
        parse_typed(form, words, prog="prog")
    assert re.fullmatch(message, str(refused.value))
    assert printed.getvalue() == ""


def test_what_is_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_typed(Outer, ["--inner.lr", "1"], prog="prog") == Outer(inner=Inner(lr=1.0))
    with pytest.raises(SystemExit) as ended:
        parse_typed(Outer, ["--help"], prog="prog")
    assert not ended.value.code and "peak learning rate" in capsys.readouterr().out
