"""llm2clip data make: tars that all commands read, from folders and tables; what is left out is named."""

import csv
import json
import tarfile
from pathlib import Path

import pytest
from data_world import jpeg
from PIL import Image

from llm2clip_plugin.cli import main
from llm2clip_plugin.data.sources import SourceConfig, open_source


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures with captions, and one of each trouble."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.v2.jpg", "sub/c.jpg", "no-text_2.jpg")):
        (folder / name).write_bytes(jpeg(number))
    for name in ("a", "b.v2", "copy", "cut"):
        (folder / f"{name}.txt").write_text(f"the picture {name}\n")
    (folder / "sub" / "c.json").write_text('{"caption": "c", "long_caption": "the long c", "place": "here"}')
    (folder / "copy.jpg").write_bytes(jpeg(0))
    (folder / "cut.jpg").write_bytes(jpeg(9)[:-400])
    (folder / "a.gif").write_bytes(b"")
    Image.new("P", (40, 30), 3).save(folder / "a.gif")
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / ".hidden.jpg").write_bytes(jpeg(1))
    return folder


def samples(path: Path, **more: str) -> dict[str, list[tuple[str, str]]]:
    source = open_source(SourceConfig(path=str(path), **more))
    read = [source[number] for number in range(len(source))]
    assert all(sample.read_image() for sample in read)
    return {sample.key: [(caption.text, caption.kind) for caption in sample.captions] for sample in read}


def test_a_folder_becomes_tars(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "made"
    assert main(["data", "make", str(photos), "--output", str(output)]) == 0
    assert samples(output) == {
        "a": [("the picture a", "short")],
        "a-2": [("the picture a", "short")],
        "b_v2": [("the picture b.v2", "short")],
        "sub/c": [("c", "short"), ("the long c", "long")],
    }
    with tarfile.open(output / "00000.tar") as tar:
        assert tar.extractfile("a-2.jpg").read() == jpeg(0)  # as it was
        assert "a.png" in tar.getnames()  # the .gif
        assert json.load(tar.extractfile("sub/c.json"))["place"] == "here"
    left_out = [json.loads(line) for line in (output / "left-out.jsonl").read_text().splitlines()]
    reasons = {one["image"]: one["reason"].partition(":")[0] for one in left_out}
    not_pictures = {"cut.jpg": "unreadable", "drawing.svg": "not a picture"}
    assert reasons == {"copy.jpg": "copy", "no-text_2.jpg": "no caption", **not_pictures}
    said = capsys.readouterr().out
    assert "4 samples, 5 captions" in said and "left out: 4" in said
    assert main(["data", "make", str(photos), "--output", str(output)]) == 2  # nothing is replaced
    assert main(["data", "make", str(photos), "--output", str(output), "--overwrite", "--file-names"]) == 0
    assert samples(output)["no-text_2"] == [("no text", "short")]
    assert main(["data", "check", str(output)]) == 0


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_becomes_tars(photos: Path, tmp_path: Path, delimiter: str):
    rows = [
        {"file_name": "a.jpg", "text": "one, more", "place": "x"},
        {"file_name": "a.jpg", "text": "two", "place": "x"},
        {"file_name": "sub/c.jpg", "text": "three", "place": "y"},
        {"file_name": "gone.jpg", "text": "four", "place": "y"},
    ]
    table = photos / "metadata.csv"
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    output = tmp_path / "made"
    assert main(["data", "make", str(table), "--output", str(output)]) == 0
    assert samples(output) == {"a": [("one, more", "short"), ("two", "short")], "sub/c": [("three", "short")]}
    assert "no file: " in (output / "left-out.jsonl").read_text()
