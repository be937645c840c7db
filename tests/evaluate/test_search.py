"""llm2clip search: the nearest images to a text, resumable, with a page."""

import json
import re
import shutil

import pytest
import torch
from evaluate_world import write_data, write_llm, write_tower
from safetensors.torch import load_file

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.evaluate import search as image_index
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder

TEXTS = ["a bird on a wire", 'ein <b>Vogel</b> & "zwei"']


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an LLM, its tower and captioned images."""
    folder = tmp_path_factory.mktemp("search")
    llm = write_llm(folder / "llm")
    identity = CaptionEncoder(EncoderConfig(llm=str(llm), compute_dtype="float32"), "cpu").identity()
    write_tower(folder / "tower", identity)
    write_data(folder / "data")
    return folder


def run(place, *words, texts=TEXTS):
    out = place / "out"
    options = ["--output", str(out / "page.html"), "--json", str(out / "hits.json"), *words]
    status = cli(["search", str(place / "tower"), "--data", str(place / "data" / "pairs.jsonl"), *texts, *options])
    return status, json.loads((out / "hits.json").read_text(encoding="utf-8")) if status == 0 else None


def naive(place):
    """Key -> cosine for each text, one image at a time."""
    dual, images = load_dual_encoder(place / "tower"), ImageConfig(size=32)
    normalize = Normalize(images, torch.device("cpu"))
    with torch.no_grad():
        text_QD = dual.encode_text(TEXTS)
        scores = []
        for path in sorted((place / "data" / "images").iterdir()):
            pixels = normalize(torch.from_numpy(evaluation_pixels(path.read_bytes(), images))[None])
            scores.append((path.name, (text_QD @ dual.encode_image(pixels)[0]).tolist()))
    return [{name: of_texts[number] for name, of_texts in scores} for number in range(len(TEXTS))]


def test_the_nearest_images_are_those_of_a_plain_loop(place, capsys, monkeypatch):
    monkeypatch.setattr(image_index, "PART", 5)
    status, body = run(place, "--top-k", "4", "--batch-size", "3")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert [result["text"] for result in body["results"]] == TEXTS
    for result, expected in zip(body["results"], naive(place), strict=True):
        found = {image["key"]: image["score"] for image in result["found"]}
        best = sorted(expected.values(), reverse=True)[:4]
        # float16 rounds a unit vector's products by 1e-3, the LLM's dtype may differ too
        assert list(found.values()) == pytest.approx(best, abs=5e-3)
        assert all(expected[key] == pytest.approx(score, abs=5e-3) for key, score in found.items())
        assert all(f"{score:.3f}  {key}\n" in printed.out for key, score in found.items())


def test_the_page_is_one_file_and_escapes_texts(place):
    assert run(place, "--top-k", "2")[0] == 0
    page = (place / "out" / "page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 and page.count("data:image/jpeg;base64,") == 4
    assert "ein &lt;b&gt;Vogel&lt;/b&gt; &amp;" in page and "<b>Vogel" not in page
    assert "<script" not in page and not re.search(r"(src|href)=\"(?!data:)", page) and "://" not in page
    assert "default-src 'none'" in page and "width=device-width" in page


def test_again_needs_neither_the_llm_nor_the_images(place, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy, ignore=shutil.ignore_patterns("tower-search", "out"))
    (copy / "out").mkdir()
    first = run(copy)[1]
    folders = sorted(path.name for path in (copy / "tower-search").iterdir())
    part = next((copy / "tower-search").glob("pairs.jsonl-*")) / "00000.safetensors"
    assert len(folders) == 2 and len(load_file(part)["number_N"]) == 12
    before = part.stat().st_mtime_ns
    (copy / "llm").rename(copy / "gone")
    assert run(copy)[1] == first and part.stat().st_mtime_ns == before
    capsys.readouterr()
    assert run(copy, texts=["another text"])[0] == 2  # not cached: needs the LLM
    assert re.search(r"teacher cannot be loaded: .*llm.*--llm PATH_OR_HUB_ID", capsys.readouterr().err)
    part.write_bytes(part.read_bytes()[:-9])
    assert run(copy)[0] == 2 and f"{part} is damaged" in capsys.readouterr().err
