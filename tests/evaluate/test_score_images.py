"""`llm2clip score-images`: the cosine of each image and its text, against one pair at a time in float64."""

import copy
import json

import pytest
import torch
from evaluate_world import write_data, write_llm, write_tower
from torch.nn import functional as F

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.evaluate.score_images import ImageTextCosine
from llm2clip_plugin.text.config import EncoderConfig
from llm2clip_plugin.text.encoder import CaptionEncoder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an LLM, its tower and captioned images."""
    folder = tmp_path_factory.mktemp("score")
    llm = write_llm(folder / "llm")
    identity = CaptionEncoder(EncoderConfig(llm=str(llm), compute_dtype="float32"), "cpu").identity()
    write_tower(folder / "tower", identity)
    write_data(folder / "data")
    return folder


def pairs(place):
    """(pixels, text) of each image's first caption, by key."""
    images, normalize = ImageConfig(size=32), Normalize(ImageConfig(size=32), torch.device("cpu"))
    found = {}
    for row in map(json.loads, (place / "data" / "pairs.jsonl").open()):
        pixels = evaluation_pixels((place / "data" / row["image"]).read_bytes(), images)
        found[row["id"]] = (normalize(torch.from_numpy(pixels)[None]), row["caption"])
    return found


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
