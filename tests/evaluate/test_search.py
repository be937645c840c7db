"""llm2clip search and score-images: against a plain loop over pairs of an image and a text."""

import copy
import json
import re
import shutil

import pytest
import torch
from evaluate_world import write_data, write_llm, write_tower
from safetensors.torch import load_file
from torch.nn import functional as F

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.evaluate import search as image_index
from llm2clip_plugin.evaluate.score_images import ImageTextCosine
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


def pairs(place):
    """(pixels, text) of each image's first caption, by key."""
    images, normalize = ImageConfig(size=32), Normalize(ImageConfig(size=32), torch.device("cpu"))
    found = {}
    for row in map(json.loads, (place / "data" / "pairs.jsonl").open()):
        pixels = evaluation_pixels((place / "data" / row["image"]).read_bytes(), images)
        found[row["id"]] = (normalize(torch.from_numpy(pixels)[None]), row["caption"])
    return found


def naive(place):
    """Key -> cosine for each text, one image at a time."""
    dual = load_dual_encoder(place / "tower")
    with torch.no_grad():
        text_QD = dual.encode_text(TEXTS)
        scores = {key: (text_QD @ dual.encode_image(pixels)[0]).tolist() for key, (pixels, _) in pairs(place).items()}
    return [{key: of_texts[number] for key, of_texts in scores.items()} for number in range(len(TEXTS))]


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


def cosine(place, pixels, text):
    """Tower, projection and adapter in float64 on the teacher's embedding of the text."""
    loaded = load_dual_encoder(place / "tower")
    embedding_1W, dual = loaded._embed([text]), copy.deepcopy(loaded.dual).double()
    with torch.inference_mode():
        image_1D = dual.project(dual.pool(pixels.double()))
        text_1D = dual.text_adapter(embedding_1W)
    return float(F.cosine_similarity(image_1D.double(), text_1D.double()))


def test_every_pair_has_its_cosine(place, tmp_path, capsys):
    words = [
        "score-images",
        str(place / "data" / "pairs.jsonl"),
        "--tower",
        str(place / "tower"),
        "--cluster",
        "colour",
    ]
    assert main([*words, "--output", str(tmp_path / "scores.json"), "--cache", str(tmp_path / "cache")]) == 0
    body = json.loads((tmp_path / "scores.json").read_text())
    scores = {item["id"]: item["score"] for item in body["items"]}
    assert len(scores) == 12 * 4 and {item["cluster"] for item in body["items"]} == {"red", "green", "blue", "white"}
    for key, (pixels, text) in list(pairs(place).items())[::5]:
        of_text = [
            item["score"] for item in body["items"] if item["id"].startswith(f"{key}/") and item["truth"] == text
        ]
        assert of_text == pytest.approx([cosine(place, pixels, text)], abs=5e-3)  # the cache is float16
    assert f"cosine {sum(scores.values()) / len(scores):.3f} [" in capsys.readouterr().out


def test_the_metric_is_float64s(place):
    metric, chosen = ImageTextCosine(load_dual_encoder(place / "tower")), list(pairs(place).values())[:5]
    expected = [cosine(place, *pair) for pair in chosen]
    for some in (chosen[:2], chosen[2:]):
        metric.update(torch.cat([pixels for pixels, _ in some]), [text for _, text in some])
    assert float(metric.compute()) == pytest.approx(sum(expected) / 5, abs=1e-5)
    metric.reset()
    assert float(metric(*chosen[0][:1], [chosen[0][1]])) == pytest.approx(expected[0], abs=1e-5)
    with pytest.raises(ValueError, match="one text per image"):
        metric.update(chosen[0][0], ["a", "b"])


def test_a_tower_must_be_given(place, capsys):
    assert main(["score-images", str(place / "data" / "pairs.jsonl")]) == 2
    assert "--tower" in capsys.readouterr().err
