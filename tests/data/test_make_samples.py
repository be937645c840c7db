"""llm2clip data make: which captions, fields and pixels a sample gets."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_world import encoded, jpeg
from PIL import Image

from llm2clip_plugin.cli import main


def write_table(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def made(data: Path, output: Path, *options: str) -> dict[str, bytes]:
    """The members of the tar that is written."""
    assert main(["data", "make", str(data), "--output", str(output), *options]) == 0
    with tarfile.open(output / "00000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_rows_of_one_picture_are_joined(tmp_path: Path):
    """Equal captions once; of other columns, the first row's."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    row = {"image": "a.jpg", "caption": "one", "place": "first"}
    more = [row, row | {"caption": "two"}, row | {"place": "second"}]
    members = made(write_table(tmp_path, row, *more), tmp_path / "made")
    sample = json.loads(members["a.json"])
    assert [caption["text"] for caption in sample["captions"]] == ["one", "two"]
    assert sample["place"] == "first"


LISTS = {
    '["a cat", "it\'s, a dog"]': ["a cat", "it's, a dog"],
    """['a cat', "it's, a dog"]""": ["a cat", "it's, a dog"],
    """['a cat' "it's, a dog"]""": ["a cat", "it's, a dog"],
    "['a cat'\n 'two']": ["a cat", "two"],
    '["caf\\u00e9"]': ["café"],
    "[laughs] a man": ["[laughs] a man"],
    "[laughs]": ["[laughs]"],
    "[1, 2]": ["[1, 2]"],
    "['not closed]": ["['not closed]"],
    "a cat": ["a cat"],
}


@pytest.mark.parametrize("cell", LISTS)
def test_a_cell_that_lists_texts_has_several_captions(tmp_path: Path, cell: str):
    """As Flickr30k's table has them, and as pandas writes lists and arrays."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    table = write_table(tmp_path, {"image": "a.jpg", "caption": cell})
    sample = json.loads(made(table, tmp_path / "made")["a.json"])
    assert [caption["text"] for caption in sample["captions"]] == LISTS[cell]


def test_pictures_of_16_bits_become_pngs_of_8(tmp_path: Path):
    """Other readers of the tars, such as LLaVA, would see white pictures."""
    levels = np.full((8, 8), 128 * 256, np.uint16)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(levels), "PNG"))
    table = write_table(tmp_path, {"image": "a.png", "caption": "one"})
    members = made(table, tmp_path / "made")
    picture = Image.open(io.BytesIO(members["a.png"]))
    assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (128, 128, 128))


@pytest.mark.parametrize(
    ("background", "level"), [("white", 255), ("gray", 128), ("black", 0)]
)
def test_transparent_pictures_are_put_on_the_background(
    tmp_path: Path, background: str, level: int
):
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (2, 0, 4, 2))
    (tmp_path / "a.png").write_bytes(encoded(image, "PNG"))
    (tmp_path / "b.jpg").write_bytes(jpeg(0))
    table = write_table(
        tmp_path,
        {"image": "a.png", "caption": "one"},
        {"image": "b.jpg", "caption": "two"},
    )
    members = made(table, tmp_path / "made", "--background", background)
    picture = Image.open(io.BytesIO(members["a.png"]))
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (level, level, level)
    assert picture.getpixel((3, 1)) == (
        0,
        0,
        200,
    )
    assert members["b.jpg"] == jpeg(0)
    stays = made(table, tmp_path / "stays")
    assert stays["a.png"] == (tmp_path / "a.png").read_bytes()
