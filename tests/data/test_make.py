"""llm2clip data make: tars that all commands read, from folders and tables; what is left out is
named."""

import csv
import json
import os
import tarfile
import unicodedata
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
    (folder / "sub" / "c.json").write_text(
        '{"caption": "c", "long_caption": "the long c", "place": "here"}'
    )
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
    captions = {}
    for sample in read:
        captions[sample.key] = [
            (caption.text, caption.kind) for caption in sample.captions
        ]
    return captions


def test_a_folder_becomes_tars(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "made"
    assert main(["data", "make", str(photos), "--output", str(output)]) == 0
    assert samples(output) == {
        "a": [("the picture a", "short")],
        "a-2": [("the picture a", "short"), ("the picture copy", "short")],
        "b_v2": [("the picture b.v2", "short")],
        "sub/c": [("c", "short"), ("the long c", "long")],
    }
    with tarfile.open(output / "00000.tar") as tar:
        assert tar.extractfile("a-2.jpg").read() == jpeg(0)  # as it was
        assert "a.png" in tar.getnames()  # the .gif
        assert json.load(tar.extractfile("sub/c.json"))["place"] == "here"
    left_out = [
        json.loads(line)
        for line in (output / "left-out.jsonl").read_text().splitlines()
    ]
    reasons = {
        sample["image"]: sample["reason"].partition(":")[0] for sample in left_out
    }
    not_pictures = {"cut.jpg": "unreadable", "drawing.svg": "not a picture"}
    assert reasons == {
        "copy.jpg": "copy",
        "no-text_2.jpg": "no caption",
        **not_pictures,
    }
    said = capsys.readouterr().out
    assert "4 samples, 6 captions" in said
    assert "joined from exact copies: 1 caption" in said
    assert "left out: 4" in said
    # nothing is replaced
    assert main(["data", "make", str(photos), "--output", str(output)]) == 2
    assert (
        main(
            [
                "data",
                "make",
                str(photos),
                "--output",
                str(output),
                "--overwrite",
                "--file-names",
            ]
        )
        == 0
    )
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
    assert samples(output) == {
        "a": [("one, more", "short"), ("two", "short")],
        "sub/c": [("three", "short")],
    }
    assert "no file: " in (output / "left-out.jsonl").read_text()


def left_out(output: Path) -> dict[str, str]:
    lines = (output / "left-out.jsonl").read_text().splitlines()
    return {sample["image"]: sample["reason"] for sample in map(json.loads, lines)}


def test_links_out_of_the_folder_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "photos"
    outside = tmp_path / "outside"
    output = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (outside / "more").mkdir(parents=True)
    pictures = [
        folder / "a.jpg",
        folder / "b.jpg",
        folder / "sub" / "c.jpg",
        outside / "d.jpg",
        outside / "more" / "e.jpg",
    ]
    for path in pictures:
        path.write_bytes(jpeg(ord(path.stem)))
    (outside / "secret").write_text("root:x:0:0")
    (folder / "a.txt").symlink_to(outside / "secret")
    (folder / "b.txt").write_text("the picture b")
    (folder / "sub" / "c.txt").symlink_to("../b.txt")
    (folder / "d.jpg").symlink_to(outside / "d.jpg")
    (folder / "d.txt").write_text("the picture d")
    (folder / "more").symlink_to(outside / "more")
    (folder / "again").symlink_to("sub")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    assert main(["data", "make", str(folder), "--output", str(output)]) == 0
    assert samples(output) == {
        "b": [("the picture b", "short")],
        "sub/c": [("the picture b", "short")],
    }
    reasons = left_out(output)
    assert {*reasons} == {"a.jpg", "d.jpg", "more", "circle.jpg"}
    assert all("link out of the folder" in reason for reason in reasons.values())
    assert (
        "root:x"
        not in (output / "left-out.jsonl").read_text() + capsys.readouterr().out
    )


def test_paths_out_of_the_image_folder_are_left_out(tmp_path: Path):
    folder = tmp_path / "photos"
    output = tmp_path / "made"
    (folder / "in").mkdir(parents=True)
    for name in ("photos/in/a.jpg", "photos/in/b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(jpeg(ord(name[-5])))
    (folder / "link.jpg").symlink_to(tmp_path / "c.jpg")
    names = [
        "in/a.jpg",
        str(folder / "in" / "b.jpg"),
        "../c.jpg",
        str(tmp_path / "c.jpg"),
        "link.jpg",
    ]
    table = folder / "table.csv"
    table.write_text(
        "image,caption\n" + "".join(f"{name},x{i}\n" for i, name in enumerate(names))
    )
    assert main(["data", "make", str(table), "--output", str(output)]) == 0
    assert [*samples(output).values()] == [[("x0", "short")], [("x1", "short")]]
    reasons = left_out(output)
    assert {*reasons} == {*names[2:]}
    assert all("outside of the image folder" in why for why in reasons.values())


def test_pipes_and_devices_are_no_pictures(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(1))
    for name in ("pipe.jpg", "b.txt", "text.txt"):
        os.mkfifo(folder / name)
    (folder / "b.jpg").write_bytes(jpeg(2))
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "a.txt").write_text("the picture a")
    assert (
        main(
            [
                "data",
                "make",
                str(folder),
                "--output",
                str(tmp_path / "made"),
                "--file-names",
            ]
        )
        == 0
    )
    reasons = left_out(tmp_path / "made")
    assert (
        reasons["pipe.jpg"] == "unreadable: not a regular file, but a pipe or a device"
    )
    assert (
        reasons["b.jpg"]
        == "unreadable caption: b.txt: not a regular file, but a pipe or a device"
    )
    assert {*reasons} == {"pipe.jpg", "b.jpg", "zero.jpg"}
    (folder / "rows.csv").write_text("image,caption\na.jpg,x\npipe.jpg,y\n")
    assert (
        main(
            [
                "data",
                "make",
                str(folder / "rows.csv"),
                "--output",
                str(tmp_path / "rows"),
            ]
        )
        == 0
    )
    assert {*left_out(tmp_path / "rows")} == {"pipe.jpg"}


@pytest.mark.parametrize(
    "name, body, says",
    [
        ("a.json", b"[" * 100_000, "unreadable caption: a.json: it is nested too deep"),
        (
            "a.json",
            b'{"a":' * 100_000,
            "unreadable caption: a.json: it is nested too deep",
        ),
        (
            "a.json",
            b'{"caption": "x", "caption": "y"}',
            "a.json: an object has the name 'caption' twice; rename one",
        ),
        (
            "a.json",
            b'["x"]',
            "unreadable caption: a.json: contains a list, expected an object",
        ),
        (
            "a.txt",
            "caf\u00e9".encode("latin-1"),
            "unreadable caption: a.txt is not UTF-8: byte 0xe9 at offset 3; convert",
        ),
        (
            "a.txt",
            "a cat".encode("utf-16"),
            "convert it, for example iconv -f UTF-16 -t UTF-8 a.txt",
        ),
        ("a.txt", "\u00a0\u200b\ufeff\n".encode(), "no caption"),
        (
            "a.txt",
            b" " * 16_000_001,
            "unreadable caption: a.txt: 16,000,001 bytes, expected at most 16,000,000",
        ),
    ],
)
def test_damaged_captions_are_left_out(
    name: str, body: bytes, says: str, tmp_path: Path
):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(jpeg(1))
    (folder / "b.jpg").write_bytes(jpeg(2))
    (folder / "b.txt").write_text("b")
    (folder / name).write_bytes(body)
    assert main(["data", "make", str(folder), "--output", str(tmp_path / "made")]) == 0
    assert says in left_out(tmp_path / "made")["a.jpg"]


def test_captions_in_files_with_capital_endings_are_read(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, ending in (("A", ".JPG"), ("b", ".jpg")):
        (folder / f"{name}{ending}").write_bytes(jpeg(ord(name)))
    (folder / "A.TXT").write_text("a")
    (folder / "b.JSON").write_text('{"caption": "b"}')
    assert main(["data", "make", str(folder), "--output", str(tmp_path / "made")]) == 0
    source = open_source(SourceConfig(path=str(tmp_path / "made")))
    texts = [source.captions(number)[1][0].text for number in range(len(source))]
    assert texts == ["a", "b"]


def test_names_of_a_table_are_found_in_another_unicode_form_and_urls_are_called_that(
    tmp_path: Path,
):
    forms = ("NFC", "NFD")
    for number, (form, name) in enumerate(zip(forms, ("é.jpg", "ü.jpg"), strict=True)):
        (tmp_path / unicodedata.normalize(form, name)).write_bytes(jpeg(number))
    rows = ["image,caption", "https://x.org/a.jpg,web"]
    rows.append(unicodedata.normalize("NFD", "é.jpg") + ",first")
    rows.append(unicodedata.normalize("NFC", "ü.jpg") + ",second")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows), encoding="utf-8")
    assert main(["data", "make", str(table), "--output", str(tmp_path / "made")]) == 0
    source = open_source(SourceConfig(path=str(tmp_path / "made")))
    assert len(source) == 2
    reasons = left_out(tmp_path / "made")
    assert [*reasons] == ["https://x.org/a.jpg"]
    assert reasons["https://x.org/a.jpg"].startswith("URL: download")


@pytest.mark.parametrize(
    "words",
    [
        ["~/photos", "--output=~/made"],
        ["~/photos", "--output", "~/made"],
        ["--output", "~/made", "--data=~/photos"],
    ],
    ids=" ".join,
)
def test_the_home_folder_in_quotes_or_after_an_equals_sign_is_meant(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
):
    """Shells leave that ~ as it is; the folder would be named so."""
    assert photos == tmp_path / "photos"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "make", *words]) == 0
    assert (tmp_path / "made" / "00000.tar").is_file()
    assert not (tmp_path / "~").exists()


def test_captions_of_equal_pictures_are_joined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "flags"
    folder.mkdir()
    flags = {
        "fr": ("flag of France", 1),
        "bl": ("flag of Saint Barth\u00e9lemy", 1),
        "mf": ("flag of France", 1),
    }
    flags |= {"de": ("flag of Germany", 2)}
    for name, (caption, seed) in flags.items():
        (folder / f"{name}.jpg").write_bytes(jpeg(seed))
        (folder / f"{name}.json").write_text(
            json.dumps({"caption": caption, "code": name})
        )
    rows = [f"{name}.jpg,{caption}\n" for name, (caption, _) in flags.items()]
    (folder / "flags.csv").write_text("file,caption\n" + "".join(rows))
    for source in (folder, folder / "flags.csv"):
        output = tmp_path / f"made-{source.name}"
        assert main(["data", "make", str(source), "--output", str(output)]) == 0
        (joined,) = [
            captions for captions in samples(output).values() if len(captions) > 1
        ]
        assert sorted(text for text, _ in joined) == [
            "flag of France",
            "flag of Saint Barth\u00e9lemy",
        ]
        assert "joined from exact copies: 1 caption" in capsys.readouterr().out
        copies = [
            reason
            for reason in left_out(output).values()
            if reason.startswith("copy: of ")
        ]
        assert len(samples(output)) == 2
        assert len(copies) == 2


def test_a_field_with_text_is_named_where_no_caption_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "photos" / "a.json").write_text(
        '{"names": {"en": "dog", "de": "Hund"}, "code": "x"}'
    )
    words = [
        "data",
        "make",
        str(tmp_path / "photos"),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main(words) == 2
    assert (
        "a.jpg: no caption; use a field with text, --fields names=short, or write"
        in capsys.readouterr().err
    )
    assert main([*words, "--fields", "names=short"]) == 0
    assert samples(tmp_path / "made") == {"a": [("dog", "short"), ("Hund", "short")]}
