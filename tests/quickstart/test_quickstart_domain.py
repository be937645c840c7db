"""Tux Paint's stamps as an unseen domain: the shard from a folder of stamps, and what is measured on it."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import claims
import domain
import models
import numpy as np
import openclipart
import pytest
import report
import shards
import torch
import tuxpaint
from PIL import Image
from quickstart_folders import IDENTITY, WIDTH, write_adapter, write_cache, write_run

from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import load_tower

OWL = "An owl.\nde.utf8=Eine Eule.\nzh_CN.utf8=猫头鹰。\npt.utf8=Uma coruja.\nfr.utf8=An owl.\n"


def add_stamp(root: Path, name: str, text: str, color: str = "red", size: tuple[int, int] = (40, 20)) -> None:
    path = root / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    picture.paste(color, (10, 10, 10 + size[0], 10 + size[1]))
    picture.crop((0, 0, 60, 40)).save(path)
    if text:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


@pytest.fixture
def stamps(tmp_path) -> Path:
    root = tmp_path / "stamps"
    add_stamp(root, "animals/birds/owl", OWL)
    add_stamp(root, "animals/birds/cartoon/owl.2", OWL, "blue")
    add_stamp(root, "food/apple", "An apple.\nde.utf8=Ein Apfel.", "green")
    (root / "food" / "apple.svg").write_text("<svg/>")
    add_stamp(root, "food/apple_mirror", "")
    add_stamp(root, "symbols/alphabets/a", "A")
    return root


def test_a_shard_is_made_of_stamps(stamps, tmp_path) -> None:
    tuxpaint.prepare(tmp_path / "out", stamps)
    source = open_source(SourceConfig(path=str(tmp_path / "out" / tuxpaint.SHARD)))
    about = {source[number].key: source[number].meta for number in range(len(source))}
    assert set(about) == {"animals_birds_owl", "animals_birds_cartoon_owl_2", "food_apple"}  # no symbol, no mirror
    assert [about[key]["style"] for key in sorted(about)] == ["drawing", "photograph", "drawing"]
    owl = about["animals_birds_owl"]
    assert (owl["concept"], owl["family"], owl["kind"]) == ("An owl.", "animals/birds", "animals")
    assert about["animals_birds_cartoon_owl_2"]["family"] == "animals/birds"
    texts = {(c.language, c.text) for c in source[[*about].index("animals_birds_owl")].captions}
    assert texts == {("en", "An owl."), ("de", "Eine Eule."), ("zh", "猫头鹰。")}  # no repeated English, no Portuguese


def test_a_stamp_is_whole_on_white(stamps) -> None:
    picture = Image.open(io.BytesIO(tuxpaint.square(stamps / "animals" / "birds" / "owl.png")))
    assert picture.size == (tuxpaint.SIDE, tuxpaint.SIDE) and picture.mode == "RGB"
    pixels = np.array(picture)
    assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()  # transparent, and padded above and below
    assert tuple(pixels[49, 49]) == (255, 0, 0)


def test_the_shard_is_kept_and_bad_folders_are_told(stamps, tmp_path, monkeypatch) -> None:
    def run(*options: object, path: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("PATH", path) if path else None
        command = [sys.executable, tuxpaint.__file__, "--output", str(tmp_path / "out"), *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("--stamps", stamps).stderr == f"3 stamps in {tmp_path / 'out' / tuxpaint.SHARD}\n"
    assert (run("--stamps", tmp_path / "none").returncode, run().stderr) == (0, "")  # the shard is there
    (tmp_path / "out" / tuxpaint.SHARD).unlink()
    bad = run("--stamps", tmp_path / "none")
    assert bad.returncode == 1 and "contains no pictures with a sentence; expected X.png with X.txt" in bad.stderr
    if not tuxpaint.INSTALLED.is_dir():
        away = run(path=str(tmp_path))
        assert away.returncode == 1 and "apt-get is not installed" in away.stderr and "TUXPAINT_STAMPS" in away.stderr
    assert not (tmp_path / "out" / tuxpaint.SHARD).exists()


def test_chance_with_several_right_answers() -> None:
    order = np.random.default_rng(0).permuted(np.tile(np.arange(7), (20_000, 1)), axis=1)
    best = np.min([(order == right).argmax(1) for right in range(3)], axis=0) + 1
    assert claims.chance_of(7, 3) == pytest.approx((1 / best).mean(), abs=0.01)
    assert claims.chance_of(7) == pytest.approx(np.mean(1 / np.arange(1, 8)))
    assert claims.chance_of(3, 3) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/, stamps/ with captions in both caches, and untrained towers of both teachers."""
    folder = tmp_path_factory.mktemp("quickstart-domain")
    shards.prepare(folder / "data", shards.Part(concepts=(5, 4, 9), languages=("de",)))
    for number in range(12):
        text = f"Thing {number // 2}.\nde.utf8=Ding {number // 2}, Bild {number}."
        add_stamp(folder / "from", f"{'animals' if number < 6 else 'food'}/{number}", text, f"rgb({20 * number},99,9)")
        add_stamp(folder / "from", f"food/cartoon/{number}", text, f"rgb(9,{20 * number},9)")
    tuxpaint.prepare(folder / "stamps", folder / "from")
    models.build_tiny_tower(folder / "tiny", 28)
    for name, cache, identity in (
        ("raw", "raw", IDENTITY),
        ("tuned", "tuned-seed0", write_adapter(folder / "data")),
    ):
        for data in (folder / "data" / "all", folder / "stamps" / tuxpaint.SHARD):
            write_cache(data, folder / "data" / "cache" / cache, identity)
        torch.manual_seed(len(name))
        dual = DualEncoder(load_tower(folder / "tiny"), DualConfig(projection_dim=8, llm_width=WIDTH, pool="cls"))
        teacher = dataclasses.asdict(identity)
        export_tower(dual, folder / "out" / "towers" / f"{name}-seed0", origin="tiny", teacher=teacher)
        write_run(folder / "out", f"{name}-seed0")
    return folder


def test_the_report_has_a_part_on_the_domain(folder) -> None:
    made = report.make_report(folder / "data", folder / "out", [], domain=folder / "stamps", start=folder / "tiny")
    body = json.loads((folder / "out" / "headline.json").read_text(encoding="utf-8"))
    names = [claim["name"] for claim in body["domain"]["claims"]]
    assert names[:2] == list(domain.HEADLINE) and len(names) == 9 and names[-1].startswith("teacher: sentences in")
    assert not any("photographs" in claim["name"] for claim in body["headline"] + body["others"])
    assert {claim["name"] for claim in body["domain"]["languages"]} == {
        f"{tag}, {side}" for tag in ("de", "en") for side in domain.SIDES.values()
    }
    # untrained copies of the start tower: the same neighbors
    assert [claim["difference"] for claim in body["domain"]["same_kind"]] == [0, 0]
    said = " ".join(body["domain"]["sentences"])
    assert "differences shown (p < .05): none" in said and "fine-tuned LLM against before training: +.000" in said
    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert "12 photographs and 12 drawings" in page and "Ding" in page and "GPL-2" in page
    assert made.domain is not None and [len(table.rows) for table in made.domain.tables] == [9, 8, 4, 2]


def test_pictures_with_the_same_sentence_are_all_right(folder) -> None:
    source, caches = domain.open_domain(folder / "stamps"), report.open_caches(folder / "data" / "cache")
    path = folder / "out" / "towers" / "raw-seed0"
    dual, cache = report.open_tower(path, caches)
    tower = domain.measure_domain(path, dual, cache, source)
    pairs, by_hand = tower.pairs, []
    photographs = [n for n, meta in enumerate(pairs.meta) if meta["style"] == "photograph"]
    for sentence in sorted({pairs.meta[n]["concept"] for n in photographs}):
        query = next(m for m, caption in enumerate(pairs.captions) if caption.text == sentence)
        ranked = sorted(photographs, key=lambda n: -float(pairs.image_ND[n] @ pairs.text_MD[query]))
        by_hand.append(1 / (1 + [pairs.meta[n]["concept"] == sentence for n in ranked].index(True)))
    found = tower.queries(["photograph"], ["en"], "t2i")
    assert sorted(found.scores) == pytest.approx(sorted(by_hand)) and len(by_hand) == 6
    assert found.chance == pytest.approx(claims.chance_of(12, 2))
    assert tower.recall("photograph", ["en"], chance=True)["t2i_r1"] == pytest.approx(2 / 12)
    # in German each picture has its own sentence, but that of the other picture of the thing is right, too
    assert len(tower.queries(["photograph"], ["de"], "t2i").scores) == 12


def test_the_nearest_picture_is_another_one() -> None:
    features = domain.ImageFeatures(
        feature_ND=torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.3, 1]]),
        label_N=torch.tensor([0, 0, 1, 0]),
        keys=list("abcd"),
        clusters=list("abcd"),
        broken=[],
    )
    found = domain.nearest_is_same(features)
    assert found.scores.tolist() == [1, 1, 0, 0] and found.chance == pytest.approx((2 + 2 + 0 + 2) / 4 / 3)


def test_towers_without_the_sentences_embeddings_are_told(folder, tmp_path) -> None:
    (tmp_path / "all").symlink_to(folder / "data" / "all")
    write_cache(folder / "data" / "all", tmp_path / "cache" / "raw")
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "raw-seed0").symlink_to(folder / "out" / "towers" / "raw-seed0")
    write_run(tmp_path, "raw-seed0")
    with pytest.raises(ValueError, match=r"does not contain the captions of .*test-tuxpaint\.tar; run llm2clip embed"):
        report.make_report(tmp_path, tmp_path, [], domain=folder / "stamps", start=folder / "tiny")


def test_an_unknown_domain_is_told_before_anything_is_made(tmp_path) -> None:
    script = Path(tuxpaint.__file__).parents[1] / "quickstart.sh"
    command = ["bash", str(script), "--output", str(tmp_path / "out"), "--domain", "photos"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (2, "error: unknown domain photos; known: tuxpaint\n")
    assert not (tmp_path / "out").exists()


SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="40pt" height="20pt"><metadata>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject></rdf:RDF></metadata>{body}</svg>"""
LADDER = '<path d="M2 2 L30 2 L{x} 18 Z" fill="{fill}"/>'


def add_drawing(root: Path, name: str, title: str, body: str, keywords: tuple[str, ...] = ("hash", "wood", "Tool")):
    path = root / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    path.write_text(SVG.format(title=title, items=items, body=body), encoding="utf-8")


def test_shards_are_made_of_clip_art(tmp_path) -> None:
    root = tmp_path / "svg"
    add_drawing(root, "tools/ladder", "Old_Ladder 01", LADDER.format(x=30, fill="red"))
    add_drawing(root, "tools/ladder2", "Steps", LADDER.format(x=2, fill="blue"))  # the same, mirrored, in another color
    add_drawing(root, "tools/saw", "Saw", '<circle cx="10" cy="10" r="9"/>')
    add_drawing(root, "tools/blank", "Nothing", "")
    add_drawing(root, "tools/few", "Rake", LADDER.format(x=9, fill="red"), ("hash", "rake"))
    add_drawing(root, "flags/flag", "Flag", LADDER.format(x=9, fill="red"))
    add_drawing(root, "animals/owl", "Panda", LADDER.format(x=9, fill="red"))  # an emoji held out
    add_drawing(root, "animals/crow", "Old crow", LADDER.format(x=20, fill="red"), ("Toothbrush", "black"))
    for number in range(openclipart.COLLECTION + 1):
        add_drawing(root, f"set/{number}", "Nice icon theme", LADDER.format(x=number, fill="red"))
    openclipart.prepare(tmp_path / "out", root, 32)
    found = {}
    for split in ("train", "validation"):
        for key, png, about in shards.read_tar(tmp_path / "out" / f"{split}-openclipart.tar"):
            found[key] = about
            assert about["split"] == split and Image.open(io.BytesIO(png)).size == (32, 32)
    assert set(found) == {"tools-ladder", "tools-ladder2", "tools-saw"}
    assert found["tools-ladder"]["family"] == found["tools-ladder2"]["family"] != found["tools-saw"]["family"]
    texts = {caption["kind"]: caption["text"] for caption in found["tools-ladder"]["captions"]}
    assert texts == {"short": "old ladder", "long": "old ladder, tools, wood, tool", "keywords": "wood, tool"}
    with pytest.raises(ValueError, match="SVG"):
        openclipart.prepare(tmp_path / "none", tmp_path / "out", 32)
