"""The retrieval suites: their files, their readers, their measures, the tables, a new suite in one
file."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from evaluate_world import COLOURS, square, write_data, write_llm, write_llm_and_tower

import llm2clip_plugin.evaluate.suites as suites_package
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.contracts import CacheManifest, ScoreFile, TowerCard
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.suites import (
    hard_negatives,
    paper,
    recall_by_language,
    select_suites,
    suites,
)

NAMES = list(COLOURS)


def images(folder: Path, names) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(square(NAMES[number % 4], 10 * number))


def text(path: Path, body) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        body if isinstance(body, str) else json.dumps(body, ensure_ascii=False),
        encoding="utf-8",
    )


def karpathy(names, split_of, **extra):
    images = []
    for number, name in enumerate(names):
        sentences = [{"raw": f"caption {n} of {name} "} for n in range(6)]
        row = {
            "filename": name,
            "split": split_of(number),
            "sentences": sentences,
            **extra,
        }
        images.append(row)
    return {"images": images}


def write_suites(root: Path) -> None:
    """Three or four images of every benchmark, in the layout that its authors publish."""
    jpgs = [f"{number}.jpg" for number in range(5)]
    images(root / "flickr30k" / "flickr30k-images", jpgs)
    text(
        root / "flickr30k" / "dataset_flickr30k.json",
        karpathy(jpgs, lambda n: "test" if n else "train"),
    )
    coco_names = [f"COCO_val2014_{number:012d}.jpg" for number in range(7)]
    images(root / "coco" / "val2014", coco_names[:4])
    splits = ["test"] * 4 + ["train", "val", "restval"]
    text(
        root / "coco" / "dataset_coco.json",
        karpathy(coco_names, splits.__getitem__, filepath="val2014"),
    )
    sam = [f"sam/images/sa_{number}.jpg" for number in range(3)]
    images(root / "sharegpt4v-1k" / "data", sam)
    items = [
        {
            "image": name,
            "conversations": [{"value": "?"}, {"value": f"Long\ntext {name}"}],
        }
        for name in sam
    ]
    text(root / "sharegpt4v-1k" / "share-captioner_coco_lcs_sam_1246k_1107.json", items)
    images(root / "urban-1k" / "image", ["1.jpg", "2.jpg", "10.jpg"])
    for stem in ("1", "2", "10"):
        text(
            root / "urban-1k" / "caption" / f"{stem}.txt",
            f"A street, number {stem}.\nIt is long.",
        )
    images(root / "docci" / "images", ["test_0.jpg", "test_1.jpg", "train_0.jpg"])
    rows = [
        {
            "example_id": name,
            "split": name[:-2],
            "image_file": f"{name}.jpg",
            "description": f"All about {name}.",
        }
        for name in ("test_0", "test_1", "train_0")
    ]
    text(
        root / "docci" / "docci_descriptions.jsonlines",
        "".join(json.dumps(row) + "\n" for row in rows),
    )
    lines = (
        "image,caption\n1.jpg,一个女孩,在跳舞\n1.jpg,女孩\n2.jpg,一只狗\n3.jpg,一只猫\n"
    )
    text(root / "flickr30k-cn" / "flickr30k_cn_test.txt", lines)
    text(
        root / "coco-cn" / "coco-cn_test.txt",
        "COCO_val2014_000000000001\nCOCO_train2014_000000000002\n",
    )
    text(
        root / "coco-cn" / "imageid.human-written-caption.txt",
        "COCO_val2014_000000000001#0\t红色\nCOCO_val2014_000000000001#1\t全是红色\n"
        "COCO_train2014_000000000002#0\t蓝色\nCOCO_train2014_000000000009#0\t别的\n",
    )
    images(root / "coco-cn" / "train2014", ["COCO_train2014_000000000002.jpg"])
    images(root / "xm3600" / "images", ["a.jpg", "b.jpg", "c.jpg"])
    lines = [
        {
            "image/key": key,
            "de": {"caption": [f"Bild {key}", f"noch {key}"]},
            "te": {"caption": [f"{key} చిత్రం"]},
        }
        for key in "abc"
    ]
    text(
        root / "xm3600" / "captions.jsonl",
        "".join(json.dumps(line) + "\n" for line in lines),
    )
    images(root / "coco" / "val2017", ["000000000001.jpg", "000000000002.jpg"])
    for group in (
        "replace_obj",
        "replace_att",
        "replace_rel",
        "swap_obj",
        "swap_att",
        "add_obj",
        "add_att",
    ):
        body = {}
        for number in (0, 4):  # the published files skip numbers
            texts = {
                "caption": f"right {group} {number}",
                "negative_caption": f"wrong {group} {number}",
            }
            body[str(number)] = {
                "filename": f"00000000000{1 + number // 4}.jpg",
                **texts,
            }
        text(root / "sugarcrepe" / f"{group}.json", body)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(root of the suites, tower directory, its teacher)."""
    folder = tmp_path_factory.mktemp("suites")
    write_suites(folder / "root")
    llm, tower = write_llm_and_tower(folder)
    return folder / "root", tower, llm


def test_every_layout_is_read(setting):
    root, _, _ = setting
    sources = {name: suite.open(root) for name, suite in suites().items()}
    count = {}
    for name, source in sources.items():
        count[name] = (len(source), sum(len(row.captions) for row in source.rows))
    expected = {
        "flickr30k": (4, 20),
        "coco": (4, 20),
        "sharegpt4v-1k": (3, 3),
        "urban-1k": (3, 3),
        "docci": (2, 2),
    }
    expected |= {
        "flickr30k-cn": (3, 4),
        "coco-cn": (2, 3),
        "xm3600": (3, 9),
        "sugarcrepe": (2, 28),
    }
    assert count == expected
    assert all(
        row.image.is_file() for source in sources.values() for row in source.rows
    )
    assert sources["sharegpt4v-1k"].rows[0].captions == (
        Caption("Long text sam/images/sa_0.jpg", "long"),
    )
    assert [row.key for row in sources["urban-1k"].rows] == ["1", "2", "10"]
    assert sources["flickr30k-cn"].rows[0].captions[0] == Caption(
        "一个女孩,在跳舞", "short", "zh"
    )
    assert {caption.language for caption in sources["xm3600"].rows[0].captions} == {
        "de",
        "te",
    }
    assert sources["sugarcrepe"].rows[0].captions[:2] == (
        Caption("right replace_obj 0", "replace_obj/0/right"),
        Caption("wrong replace_obj 0", "replace_obj/0/wrong"),
    )


@pytest.mark.parametrize(
    "lines",
    [
        "7.jpg#0#zhc\t一只狗\n7.jpg#1#zhc\t狗\n",
        "7 一只狗\n7 狗\n",
        "\ufeffimage,caption\n7.jpg,一只狗\n7.jpg,狗\n",
    ],
)
def test_every_spelling_of_flickr_cn_is_read(lines, tmp_path):
    images(tmp_path / "flickr30k" / "flickr30k-images", ["7.jpg"])
    text(tmp_path / "flickr30k-cn" / "flickr30k_cna_test.txt", lines)
    (row,) = suites()["flickr30k-cn"].open(tmp_path).rows
    assert row.key == "7"
    assert [caption.text for caption in row.captions] == ["一只狗", "狗"]


def test_a_huge_array_is_read_no_further_than_needed(tmp_path, monkeypatch):
    items = [
        {"image": f"{number}.jpg", "conversations": [{}, {"value": "]}," * number}]}
        for number in range(1, 6)
    ]
    path = tmp_path / paper.SHAREGPT4V
    path.write_text(
        " [\n" + " ,\n".join(map(json.dumps, items)) + ", {cut short", encoding="utf-8"
    )
    monkeypatch.setattr(paper, "BEGINNING", path.stat().st_size - 5)
    monkeypatch.setattr(paper, "SHAREGPT4V_ITEMS", 5)
    assert [row.key for row in paper.read_sharegpt4v(tmp_path)] == [
        item["image"] for item in items
    ]
    monkeypatch.setattr(paper, "SHAREGPT4V_ITEMS", 6)
    with pytest.raises(
        ValueError, match=r"1107\.json cannot be used .* download it again"
    ):
        paper.read_sharegpt4v(tmp_path)


def test_missing_files_are_listed_with_where_to_get_them(tmp_path, setting, capsys):
    _, tower, _ = setting
    assert (
        cli(["evaluate", str(tower), "--suite", "docci", "--data", str(tmp_path)]) == 2
    )
    error = capsys.readouterr().err
    assert "docci_images.tar.gz" in error
    assert str(tmp_path / "docci" / "images") in error
    with pytest.raises(
        ValueError, match=r"unknown suite 'cocoo'; known: paper, all, flickr30k"
    ):
        select_suites("cocoo")
    assert [suite.name for suite in select_suites("coco,paper")][:3] == [
        "coco",
        "flickr30k",
        "sharegpt4v-1k",
    ]
    assert [suite.name for suite in select_suites("all")] == list(suites())
    # SugarCrepe is not in the paper
    assert [suite.name for suite in select_suites("paper")] == list(suites())[:-1]


def test_a_file_with_another_layout_is_named(tmp_path):
    images(tmp_path / "docci" / "images", ["x.jpg"])
    text(
        tmp_path / "docci" / "docci_descriptions.jsonlines",
        '{"split": "test", "image_file": "x.jpg"}\n',
    )
    with pytest.raises(
        ValueError,
        match=r"docci cannot be used \(KeyError: 'example_id'\); .* authors publish",
    ):
        suites()["docci"].open(tmp_path)
    text(tmp_path / "docci" / "docci_descriptions.jsonlines", '{"split": \n')
    with pytest.raises(
        ValueError, match=r"docci_descriptions\.jsonlines cannot be used"
    ):
        suites()["docci"].open(tmp_path)


def test_paper_prints_both_and_measured_suites_are_not_measured_again(setting, capsys):
    root, tower, llm = setting
    words = ["evaluate", str(tower), "--suite", "paper,sugarcrepe", "--data", str(root)]
    assert cli([*words, "--teacher.llm", str(llm)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^CLIP-L-336 \+ LLM2CLIP \(15 M\) \(paper, review\) +91\.2 / 82\.1 ",
        printed,
        re.MULTILINE,
    )
    assert re.search(r"^tower \(measured\) +[\d.]+ / [\d.]+", printed, re.MULTILINE)
    assert "4 images, the published test set has 1000" in printed
    output = (
        root / f"scores-{TowerCard.read(tower / TowerCard.FILE).weights_sha256[:12]}"
    )
    scores = {name: ScoreFile.read(output / f"{name}.scores.json") for name in suites()}
    xm = scores["xm3600"].metrics
    assert xm["i2t_r1"] == pytest.approx(
        (xm["short:de/i2t_r1"] + xm["short:te/i2t_r1"]) / 2
    )
    assert "all/i2t_r1" in xm
    assert set(scores["sugarcrepe"].metrics) >= {"swap_obj", "add_att", "mean"}
    assert scores["coco"].benchmark == "retrieval:coco"
    assert scores["coco"].model == str(tower)
    before = (output / "coco.scores.json").stat().st_mtime_ns
    changed = output / "docci.scores.json"
    dataclasses.replace(scores["docci"], provenance={}).write(changed)
    # captions are cached: the LLM is not needed again
    llm.rename(llm.with_name("gone"))
    try:
        assert cli(words) == 0
    finally:
        llm.with_name("gone").rename(llm)
    assert (output / "coco.scores.json").stat().st_mtime_ns == before
    assert ScoreFile.read(changed).provenance == scores["docci"].provenance


def test_a_suite_is_measured_again_when_its_pictures_or_the_preprocessing_changed(
    setting, tmp_path, capsys
):
    """Also where a picture was missing at first."""
    root, tower, llm = setting
    mine = tmp_path / "root"
    shutil.copytree(root / "flickr30k", mine / "flickr30k")
    shutil.copytree(tower, tmp_path / "tower")
    words = ["evaluate", str(tmp_path / "tower"), str(mine), "--suite", "flickr30k"]
    picture = mine / "flickr30k" / "flickr30k-images" / "3.jpg"
    picture.rename(tmp_path / "3.jpg")
    assert cli([*words, "--llm", str(llm)]) == 0
    assert "3 images, 15 captions, 1 left_out" in capsys.readouterr().out
    (tmp_path / "3.jpg").rename(picture)
    assert cli(words) == 0
    assert "4 images, 20 captions, 0 left_out" in capsys.readouterr().out
    (scores,) = mine.glob("scores-*/flickr30k.scores.json")
    assert cli(words) == 0
    before = scores.stat().st_mtime_ns
    settings = tmp_path / "tower" / "preprocessor_config.json"
    body = json.loads(settings.read_text())
    settings.write_text(json.dumps(body | {"image_mean": [0.1, 0.2, 0.3]}))
    assert cli(words) == 0
    assert scores.stat().st_mtime_ns > before


def test_an_llm_other_than_the_teacher_is_refused(setting, tmp_path, capsys):
    _, tower, _ = setting
    write_suites(tmp_path / "root")
    other = write_llm(tmp_path / "other", seed=1)
    words = [
        "evaluate",
        str(tower),
        "--suite",
        "docci",
        "--data",
        str(tmp_path / "root"),
        "--teacher.llm",
        str(other),
    ]
    assert cli(words) == 2
    assert "is not the tower's teacher" in capsys.readouterr().err
    assert not list((tmp_path / "root" / "docci").rglob(CacheManifest.FILE))


def test_evaluate_embeds_what_is_not_cached_once(setting, tmp_path, capsys):
    _, tower, llm = setting
    words = [
        "evaluate",
        str(tower),
        str(write_data(tmp_path / "data")),
        "--output",
        str(tmp_path / "scores.json"),
    ]
    assert cli([*words, "--llm", str(llm)]) == 0
    first = ScoreFile.read(tmp_path / "scores.json")
    (manifest,) = (tmp_path / "data").glob(f"embeddings-*/{CacheManifest.FILE}")
    written = manifest.stat().st_mtime_ns
    assert cli(words) == 0
    assert manifest.stat().st_mtime_ns == written
    again = ScoreFile.read(tmp_path / "scores.json")
    assert again.items == first.items
    assert first.counts["captions"] == CacheManifest.read(manifest).captions > 0
    # fewer and other captions: the error names what helps, which is no option of evaluate
    lines = (tmp_path / "data" / "pairs.jsonl").read_text(encoding="utf-8")
    lines = lines.replace('"caption"', '"no caption"').replace("nothing but", "only")
    (tmp_path / "data" / "pairs.jsonl").write_text(lines, encoding="utf-8")
    capsys.readouterr()
    assert cli(words) == 2
    assert f"or delete {manifest.parent}\n" in capsys.readouterr().err
    shutil.rmtree(manifest.parent)
    assert cli(words) == 0


def test_a_comparison_says_that_captions_changed_between_two_evaluations(
    setting, tmp_path, capsys
):
    """The keys, and so the names of the queries, are the same."""
    _, tower, llm = setting
    data = write_data(tmp_path / "data")
    scores = [str(tmp_path / f"{number}.json") for number in range(3)]
    words = ["evaluate", str(tower), str(data), "--llm", str(llm), "--kinds", "short"]
    assert cli([*words, "--output", scores[0]]) == 0
    assert cli([*words, "--output", scores[1], "--batch-size", "5"]) == 0
    lines = data.read_text(encoding="utf-8").replace("a red square", "a red thing")
    data.write_text(lines, encoding="utf-8")
    assert cli([*words, "--output", scores[2]]) == 0
    told = []
    for other in scores[1:]:
        capsys.readouterr()
        assert cli(["compare", scores[0], other, "--output", f"{tmp_path}/report"]) == 0
        told.append("different images, captions or classes" in capsys.readouterr().out)
    assert told == [False, True]


def test_hard_negatives_count_a_tie_as_half():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text_vectors = torch.tensor(
        [[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]
    )
    kinds = [
        "swap/1/right",
        "swap/1/wrong",
        "add/7/right",
        "add/7/wrong",
        "add/8/right",
        "add/8/wrong",
    ]
    about = {
        "captions": [Caption(kind, kind) for kind in kinds],
        "keys": ["x", "y"],
        "meta": [{}, {}],
        "broken": [],
    }
    owners = torch.tensor([0, 0, 0, 0, 1, 1])
    pairs = EmbeddedPairs(image_ND=image, text_MD=text_vectors, owner_M=owners, **about)
    scores = hard_negatives(pairs)
    assert scores.metrics == {"swap": 1.0, "add": 0.25, "mean": 0.625}
    assert {item["id"]: item["score"] for item in scores.items} == {
        "swap/1": 1.0,
        "add/7": 0.0,
        "add/8": 0.5,
    }
    assert {item["cluster"] for item in scores.items} == {"x", "y"}


def test_xm3600s_recall_is_the_mean_of_its_languages():
    """Every German caption finds its image among the German ones, no French one does: 1/2, not 2/3
    of all."""
    captions = [
        Caption(str(number), "short", language)
        for language in ("de", "de", "fr")
        for number in range(4)
    ]
    image = torch.eye(4)
    vectors = torch.cat([image, image + 0.01, image.roll(1, 0)])
    about = {"keys": list("abcd"), "meta": [{}] * 4, "broken": []}
    owners = torch.arange(4).repeat(3)
    pairs = EmbeddedPairs(
        image_ND=image, text_MD=vectors, owner_M=owners, captions=captions, **about
    )
    metrics = recall_by_language(pairs, RetrievalConfig()).metrics
    assert (metrics["short:de/t2i_r1"], metrics["short:fr/t2i_r1"]) == (1.0, 0.0)
    assert metrics["t2i_r1"] == 0.5
    assert metrics["all/t2i_r1"] == pytest.approx(2 / 3)


EXTENDING = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(
    encoding="utf-8"
)
PHOTOS_100 = re.search(r'```python\n("""Photos-100.*?)```', EXTENDING, re.DOTALL)[1]


def test_one_file_adds_a_suite_that_is_listed_read_measured_and_shown(
    setting, tmp_path, monkeypatch, capsys
):
    _, tower, llm = setting
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "photos_100.py").write_text(PHOTOS_100, encoding="utf-8")
    monkeypatch.setattr(
        suites_package,
        "__path__",
        [*suites_package.__path__, str(tmp_path / "plugins")],
    )
    monkeypatch.delitem(
        sys.modules, f"{suites_package.__name__}.photos_100", raising=False
    )

    words = [
        "evaluate",
        str(tower),
        "--suite",
        "photos-100",
        "--data",
        str(tmp_path),
        "--teacher.llm",
        str(llm),
    ]
    assert "photos-100" in suites()
    assert "photos-100" in [suite.name for suite in select_suites("paper")]
    assert cli(words) == 2
    assert "get it from https://photos.example/" in capsys.readouterr().err

    images(tmp_path / "photos-100" / "photos", ["a.jpg", "b.jpg"])
    text(
        tmp_path / "photos-100" / "captions.json",
        {"a.jpg": "a red square", "b.jpg": "a green square"},
    )
    assert cli([*words, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    scores = ScoreFile.read(tmp_path / "photos-100.scores.json")
    i2t, t2i = (100 * scores.metrics[f"{side}_r1"] for side in ("i2t", "t2i"))
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    table = {line[0]: line[1:] for line in lines}
    assert table["CLIP-L-336 (paper, review)"][-1] == "12.3 / 45.6"
    assert table["tower (measured)"][-1] == f"{i2t:.1f} / {t2i:.1f}"
    assert "2 images, the published test set has 100" in printed
