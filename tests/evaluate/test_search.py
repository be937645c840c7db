"""llm2clip search against a plain loop over pairs of an image and a text."""

import os
import re
import shutil

import pytest
import torch
from evaluate_world import write_data, write_llm_and_tower
from PIL import Image
from safetensors.torch import load_file

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.data.samples import BrokenSample
from llm2clip_plugin.evaluate import search as image_index

TEXTS = ["a bird on a wire", 'ein <b>Vogel</b> & "zwei"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With an LLM, its tower and captioned images."""
    path = tmp_path_factory.mktemp("search")
    write_llm_and_tower(path)
    write_data(path / "data")
    return path


def run(folder, *words):
    options = [
        "--output",
        str(folder / "page.html"),
        "--cache",
        str(folder / "cache"),
        *words,
    ]
    return cli(
        [
            "search",
            str(folder / "tower"),
            "--data",
            str(folder / "data" / "pairs.jsonl"),
            *TEXTS,
            *options,
        ]
    )


def listed(printed):
    """Text -> key -> score, as printed."""
    scores = {}
    for line in printed.splitlines():
        if line in TEXTS:
            text = line
        elif match := re.fullmatch(r" +\d+  ( ?-?\d\.\d{3})  (\S+)", line):
            scores.setdefault(text, {})[match[2]] = float(match[1])
    return scores


def naive(folder):
    """Key -> cosine for each text, one image at a time."""
    dual = load_dual_encoder(folder / "tower")
    images = ImageConfig(size=32)
    scores = [{} for _ in TEXTS]
    with torch.no_grad():
        text_QD = dual.encode_text(TEXTS)
        for file in (folder / "data" / "images").iterdir():
            pixels = torch.from_numpy(evaluation_pixels(file.read_bytes(), images))[
                None
            ]
            for number, score in enumerate(
                (text_QD @ dual.encode_image(Normalize(images)(pixels))[0]).tolist()
            ):
                scores[number][file.name] = score
    return scores


def test_a_pipe_among_pictures_is_broken_and_does_not_hang(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    source = image_index.folder_of_images(str(tmp_path))
    assert source is not None
    assert source[0].read_image()
    with pytest.raises(BrokenSample, match="not a regular file"):
        source[1].read_image()


def test_a_folders_pictures_are_those_that_data_make_takes(tmp_path):
    """GIF and TIFF, too; no hidden files, and a link to nothing is a broken picture."""
    (tmp_path / "deep.jpg").mkdir()
    for name in ("a.JPG", "b.gif", "c.tif", "deep.jpg/d.png", "._e.jpg", "f.txt"):
        picture = "png" if name.endswith("txt") else None
        Image.new("RGB", (8, 8)).save(tmp_path / name, format=picture)
    (tmp_path / "g.jpg").symlink_to("nowhere.jpg")
    source = image_index.folder_of_images(str(tmp_path))
    assert source is not None
    keys = [source.key(number) for number in range(len(source))]
    assert keys == ["a.JPG", "b.gif", "c.tif", "deep.jpg/d.png", "g.jpg"]
    with pytest.raises(BrokenSample, match="No such file"):
        source[4].read_image()


def test_the_nearest_images_are_those_of_a_plain_loop_and_the_page_escapes_texts(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(image_index, "PART", 5)
    status = run(folder, "--top-k", "4", "--batch-size", "3")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    results = listed(printed.out)
    assert list(results) == TEXTS
    for scores, expected in zip(results.values(), naive(folder), strict=True):
        best = sorted(expected.values(), reverse=True)[:4]
        # float16 rounds a unit vector's products by 1e-3, the LLM's dtype may differ too
        assert list(scores.values()) == pytest.approx(best, abs=5e-3)
        assert all(
            expected[key] == pytest.approx(score, abs=5e-3)
            for key, score in scores.items()
        )
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 8
    assert page.count("data:image/jpeg;base64,") == 8
    assert "ein &lt;b&gt;Vogel&lt;/b&gt; &amp;" in page
    assert "<b>Vogel" not in page
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "://" not in page
    assert "default-src 'none'" in page
    assert "width=device-width" in page


def test_images_are_embedded_once_and_the_teacher_is_needed(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("cache"))
    assert run(copy) == 0
    first = listed(capsys.readouterr().out)
    (part,) = (copy / "cache").glob("pairs.jsonl-*/*.safetensors")
    assert len(load_file(part)["number_N"]) == 12
    before = part.stat().st_mtime_ns
    assert run(copy) == 0
    assert part.stat().st_mtime_ns == before
    assert listed(capsys.readouterr().out) == first
    assert len(first) == 2
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    assert run(copy) == 2
    assert str(part) in capsys.readouterr().err
    part.write_bytes(whole)
    (copy / "llm").rename(copy / "gone")
    (folder / "llm").rename(folder / "gone")
    try:
        assert run(copy) == 2
    finally:
        (folder / "gone").rename(folder / "llm")
    assert re.search(
        r"teacher cannot be loaded: .*llm.*--llm PATH_OR_HUB_ID",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("data", ["data/pairs.jsonl", "data/images"])
def test_pictures_replaced_under_the_same_names_are_embedded_again(
    folder, tmp_path, capsys, data
):
    """And a picture that cannot be read is named at every search, until it can."""
    shutil.copytree(folder / "data", tmp_path / "data")
    images = tmp_path / "data" / "images"
    words = [str(folder / "tower"), str(tmp_path / data), TEXTS[0]]
    words += ["--output", "", "--cache", str(tmp_path / "cache")]
    whole = (images / "red-0.png").read_bytes()
    (images / "red-0.png").write_bytes(b"no picture")
    printed = []
    for _ in range(2):
        assert cli(["search", *words]) == 0
        printed.append(capsys.readouterr().out)
        assert "left out: sample 'red-0.png'" in printed[-1]
    (images / "red-0.png").write_bytes(whole)
    (images / "white-0.png").unlink()
    os.replace(images / "white-20.png", images / "white-40.png")
    os.replace(images / "blue-0.png", images / "white-20.png")
    assert cli(["search", *words]) == 0
    again = capsys.readouterr().out
    assert listed(again) != listed(printed[0])
    assert "red-0.png" in listed(again)[TEXTS[0]]
    assert len(list((tmp_path / "cache").iterdir())) == 2
