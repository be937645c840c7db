import io
import json
from pathlib import Path

import pytest
from data_world import encoded, img2dataset_members, jpeg, picture, write_tar
from PIL import Image

from llm2clip_plugin.cli import main


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Two shards that can be read, with one of each trouble; one truncated."""
    folder = tmp_path / "messy"
    write_tar(folder / "00000.tar", img2dataset_members(0, 20))
    # a key that shard 00000 has, a caption that another sample has
    troubles = {
        "000000000.png": encoded(picture(0, (20, 30)), "PNG"),
        "000000000.txt": b"picture number 7",
    }
    troubles |= {
        "cut.jpg": jpeg(0)[:-300],
        "cut.txt": ("word " * 600).encode(),
        "mute.jpg": jpeg(0),
        "mute.txt": b"  ",
    }
    troubles |= {
        "lost.txt": b"caf\xe9",
        "bad.jpg": jpeg(1),
        "bad.json": b"{",
        "de.jpg": jpeg(2),
    }
    troubles["de.json"] = b'{"captions": [{"text": "ein Bild", "language": "de"}, ""]}'
    write_tar(folder / "00001.tar", troubles.items())
    whole = write_tar(tmp_path / "whole.tar", img2dataset_members(0, 3)).read_bytes()
    (folder / "00002.tar").write_bytes(whole[:3000])
    return folder


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = main(["data", "check", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_everything_is_found(
    messy: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    status, report = checked(capsys, str(messy), "--workers", workers)
    assert status == 1
    assert not report["fit_for_training"]
    assert (report["samples"], report["shards"]) == (26, 2)
    assert [sample["shard"] for sample in report["broken_shards"]] == ["00002"]
    assert "no end-of-archive marker" in report["broken_shards"][0]["reason"]
    assert [f"{sample['shard']} {sample['key']}" for sample in report["broken"]] == [
        "00001 cut",
        "00001 lost",
        "00001 bad",
    ]
    assert [sample["key"] for sample in report["without_captions"]] == ["mute"]
    assert report["broken_share"] == pytest.approx(4 / 26)
    assert report["captions_by_kind"] == {"short": 24, "long": 20}
    assert report["captions_by_language"] == {"en": 43, "de": 1}
    assert report["empty_captions"] == 2
    assert report["duplicate_captions"]["most_frequent"] == [
        {"samples": 2, "value": "picture number 7"}
    ]
    assert report["duplicate_keys"]["most_frequent"] == [
        {"samples": 2, "value": "000000000"}
    ]
    lengths = report["caption_lengths"]
    assert lengths["unit"] == "words"
    assert lengths["max"] == 600
    assert lengths["over_limit"] == 1
    assert lengths["longest"] == "00001: cut"
    assert report["captions"] == 44
    assert report["images"]["formats"] == {"JPEG": 22, "PNG": 1}
    assert report["images"]["width"] == {"min": 20, "median": 64, "p99": 64, "max": 64}


def test_what_makes_training_worse_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(name: str, data: bytes, **fields: object) -> list[tuple[str, bytes]]:
        return [(f"{name}.png", data), (f"{name}.json", json.dumps(fields).encode())]

    clear = Image.new("RGBA", (40, 40), (9, 9, 9, 0))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    picture(4).save(turned, "PNG", exif=exif)
    train = [
        *sample(
            "a",
            encoded(clear, "PNG"),
            caption="A fox",
            long_caption="a fox, standing",
            title="the red fox",
            names={"en": "fox", "de": "Fuchs"},
        ),
        *sample(
            "b",
            encoded(picture(1), "PNG"),
            caption="a foxglove",
            long_caption="the flower fox",
            sha256="0f3a",
        ),
        *sample("turned", turned.getvalue(), caption="t", image="my photos/t.png"),
        *sample(
            "c",
            encoded(picture(1), "PNG"),
            caption="c",
            names={"fr": "un renard", "en": "fox"},
        ),
    ]
    validation = [
        *sample("d", encoded(picture(1), "PNG"), caption="a fox!"),
        *sample("e", jpeg(2), caption="new"),
    ]
    write_tar(tmp_path / "train.tar", train)
    write_tar(tmp_path / "validation.tar", validation)
    words = (
        str(tmp_path / "train.tar"),
        "--validation",
        str(tmp_path / "validation.tar"),
    )
    status, report = checked(capsys, *words)
    assert status == 0
    assert report["images"]["turned"] == 1
    assert (
        report["images"]["transparent"]
        == report["nested_captions"]
        == report["images"]["exact_copies"]
        == 1
    )
    assert report["unused_fields"] == {"names": 2, "title": 1}
    assert (
        report["validation"]["images_in_both"]
        == report["validation"]["captions_in_both"]
        == 1
    )
    assert report["validation"]["examples"] == [{"key": "d"}]
    assert main(["data", "check", *words]) == 0
    text = capsys.readouterr().out
    assert (
        f"\n  1 of 2 images of {tmp_path}/validation.tar are in the training data, too\n    d\n"
        in text
    )
    # a line for each problem, and none for what is not there
    assert text.count("\n  1 ") == 6
    fields = "--fields caption=short long_caption=long names=short title=short"
    unused = f"names (de en fr), title; to use them, too: {fields}"
    assert f"\n  2 fields with text are no captions: {unused}\n" in text
    assert "broken samples" not in text
    assert text.endswith("\nfit for training: 0.00% broken, 1.00% allowed\n")
    # another data set: that nothing is in both is said, too
    other = tmp_path / "other.tar"
    write_tar(other, sample("e", jpeg(2), caption="new"))
    train_tar = str(tmp_path / "train.tar")
    assert main(["data", "check", train_tar, "--validation", str(other)]) == 0
    text = capsys.readouterr().out
    assert f"\n  validation  nothing of {other} is in the training data\n" in text


def test_missing_images_do_not_hide_broken_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "19.jpg").write_bytes(b"no picture")
    rows = (
        json.dumps({"image": f"{number}.jpg", "caption": f"picture {number}"})
        for number in range(20)
    )
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert main(["data", "check", str(tmp_path / "data.jsonl")]) == 1
    assert "\n  19 images not found; set --image-folder" in (
        text := capsys.readouterr().out
    )
    assert text.index(": 19.jpg: ") < text.index(": 0.jpg: ")
