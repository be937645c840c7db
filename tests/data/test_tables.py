"""Damage in a table is an error that names the line, never another caption."""

from pathlib import Path

import pytest
from data_world import jpeg

from llm2clip_plugin.cli import main
from llm2clip_plugin.data.tables import LONGEST, Table
from llm2clip_plugin.errors import ContractError

LONG = "x" * (LONGEST + 1)


def rows_of(
    path: Path, body: str | bytes, name: str = "table.csv"
) -> list[tuple[int, list[str]]]:
    table = path / name
    table.write_bytes(body if isinstance(body, bytes) else body.encode())
    return [(row.line, [*row.cells.values()]) for row in Table(table)]


@pytest.mark.parametrize(
    "body, rows",
    [
        (
            "image,caption\na.png,one\nb.png,two\n",
            [(2, ["a.png", "one"]), (3, ["b.png", "two"])],
        ),
        (
            'image,caption\na.png,"a red, round thing"\n',
            [(2, ["a.png", "a red, round thing"])],
        ),
        (
            'image,caption\na.png,"two\nlines"\n\nb.png,x\n',
            [(2, ["a.png", "two\nlines"]), (5, ["b.png", "x"])],
        ),
        (
            'image,caption\na.png,"a ""quoted"" word"\n',
            [(2, ["a.png", 'a "quoted" word'])],
        ),
        ('image\tcaption\na.png\ta 5" disc, red\n', [(2, ["a.png", 'a 5" disc, red'])]),
        ("\ufeffimage; caption\r\na.png;one, two\r\n", [(2, ["a.png", "one, two"])]),
        (
            "image,caption,,\na.png,one,,\nb.png,two,,,\n",
            [(2, ["a.png", "one"]), (3, ["b.png", "two"])],
        ),
        ("image,caption\n\u5b57.png,\u732b\n", [(2, ["\u5b57.png", "\u732b"])]),
        (f"image,caption\na.png,{LONG[1:]}\n", [(2, ["a.png", LONG[1:]])]),
    ],
)
def test_whole_tables(tmp_path: Path, body: str, rows: list) -> None:
    assert rows_of(tmp_path, body) == rows


@pytest.mark.parametrize(
    "body, says",
    [
        (
            "image,caption\n1.png,a\n0.png,a red, round thing\n",
            r"line 3: 3 fields, expected 2 \(image, caption\); put",
        ),
        ("image,caption\n0.png\n", r"line 2: 1 field, expected 2"),
        (
            'image,caption\n0.png,a\n1.png,"b\n2.png,c\n3.png,d\n',
            "line 3: a quote is opened and never closed",
        ),
        (
            'image,caption\n0.png,"a\n1.png,b\n2.png,c"\n',
            "line 2: a quoted field goes on over line 3, .*: 1.png,b",
        ),
        (
            'image,caption\n0.png,"a\n1.png,"b"\n',
            "line 3: text after a closing quote, in .* that begins in line 2",
        ),
        (
            'image,caption\n0.png,"a" b\n',
            'line 2: text after a closing quote; write a quote inside of quotes as ""',
        ),
        (
            "image,caption,caption\n0.png,a,b\n",
            "has 'caption' as columns 2 and 3; rename one",
        ),
        ("image,caption,\n0.png,a,b\n", "line 2: a value in a column without a name"),
        (
            f"image,caption\n0.png,a\n1.png,{LONG}\n",
            r"line 3: field 'caption' has 131,073 characters, at most 131,072",
        ),
        (
            f'image,caption\n0.png,"{LONG}\n',
            "line 2: a quote is opened and never closed",
        ),
        ("", "is empty; expected a header"),
        (
            "image,caption\n0.png,a\n1.png,caf\u00e9\n".encode("latin-1"),
            "line 3: not UTF-8, perhaps Latin-1: 1.png,café; ",
        ),
        (
            "image,caption\n0.png,caf\u00e9\n".encode("utf-16"),
            "line 1: not UTF-8, perhaps UTF-16; .*iconv -f utf16 -t utf8",
        ),
        ("image,caption\n0.png,a\0b\n", "line 2: a NUL byte"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "bytes",
)
def test_damage_names_the_line(tmp_path: Path, body: str | bytes, says: str) -> None:
    with pytest.raises(ContractError, match=f"table.csv.*{says}"):
        rows_of(tmp_path, body)


@pytest.mark.parametrize(
    "body, more, says",
    [
        ("a,caption\n1.png,x\n", [], "no image column (image, file_name, "),
        (
            "image,caption\n",
            [],
            "table.csv has a header and no rows; expected a row a picture",
        ),
        ("a,caption\n1.png,x\n", [], "--image-field; columns: a, caption"),
        (
            "a,caption\n1.png,x\n",
            ["--image-field", "b"],
            "has no column 'b' (--image-field); columns: a, caption",
        ),
        (
            "image,words\n1.png,x\n",
            [],
            "set --fields NAME=short; columns: image, words",
        ),
        (
            "image,caption\n1.png,a red, round thing\n",
            [],
            "table.csv, line 2: 3 fields, expected 2",
        ),
    ],
)
def test_data_make_refuses_before_it_writes(
    body: str,
    more: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "1.png").write_bytes(jpeg(1))
    (tmp_path / "table.csv").write_text(body)
    assert (
        main(
            [
                "data",
                "make",
                str(tmp_path / "table.csv"),
                "--output",
                str(tmp_path / "out"),
                *more,
            ]
        )
        == 2
    )
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()
