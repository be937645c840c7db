"""From files to recall: parts, groups, ranks, broken samples, the command."""

import json
from pathlib import Path

import pytest
import torch
from evaluate_world import (
    COLOURS,
    tiny_dual,
    write_data,
    write_llm,
    write_llm_and_tower,
    write_tower,
)
from forked import Command
from tiny_data import made_up, make_cache
from tower_runs import ROOT, finish, places

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.evaluate import retrieval
from llm2clip_plugin.evaluate.commands import intervals
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.ranks import recall
from llm2clip_plugin.evaluate.retrieval import evaluate_retrieval, report_retrieval
from llm2clip_plugin.evaluate.suites import InMemorySource, Row

IMAGES = ImageConfig(size=32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(data, cache, tower directory), all on disk."""
    folder = tmp_path_factory.mktemp("world")
    data = write_data(folder / "data")
    return (
        data,
        make_cache(data, directory=folder / "cache"),
        write_tower(folder / "tower"),
    )


@pytest.fixture
def opened(world):
    data, cache, _ = world
    return open_source(SourceConfig(path=str(data))), EmbeddingCache.open(cache)


def test_all_and_parts_equal_recall_on_the_same_embeddings(opened):
    source, cache = opened
    dual = tiny_dual()
    report = evaluate_retrieval(dual, source, cache, IMAGES, RetrievalConfig(batch=5))
    pairs = report.pairs
    assert list(report.parts) == ["all", "short:en", "long:en", "short:de"]
    assert report.counts == {"images": 12, "captions": 48, "left_out": 0}
    metrics = report.metrics()
    whole = recall(pairs.image_ND, pairs.text_MD, pairs.owner_M)
    assert {key: metrics[key] for key in metrics if "/" not in key} == whole
    part = torch.tensor([caption.kind == "long" for caption in pairs.captions])
    alone = recall(pairs.image_ND, pairs.text_MD[part], pairs.owner_M[part])
    assert {
        key.removeprefix("long:en/"): value
        for key, value in metrics.items()
        if key.startswith("long:en")
    } == alone
    selected = evaluate_retrieval(
        dual, source, cache, IMAGES, RetrievalConfig(kinds=("long",), languages=("en",))
    )
    assert selected.metrics() == pytest.approx(alone)
    assert selected.counts["captions"] == 24
    with torch.no_grad():
        pixels = [
            torch.from_numpy(evaluation_pixels(source[index].read_image(), IMAGES))
            for index in range(12)
        ]
        expected = dual.encode_image(Normalize(IMAGES)(torch.stack(pixels)))
    assert torch.allclose(pairs.image_ND, expected, atol=1e-6)


def test_concepts_are_right_as_a_group_and_count_once_in_the_pool():
    names = [name for name in COLOURS for _ in range(3)]
    seen_ND = torch.eye(len(COLOURS)).repeat_interleave(3, dim=0)
    captions = [Caption(f"a {name} square") for name in names]
    meta = [{"colour": name} for name in names]
    about = {
        "captions": captions,
        "meta": meta,
        "keys": [f"image {number}" for number in range(12)],
        "broken": [],
    }
    pairs = EmbeddedPairs(
        image_ND=seen_ND, text_MD=seen_ND, owner_M=torch.arange(12), **about
    )
    alone = report_retrieval(pairs, RetrievalConfig())
    # three images share the one right answer's embedding
    assert alone.metrics()["i2t_r1"] == pytest.approx(1 / 3)
    grouped = report_retrieval(pairs, RetrievalConfig(group="colour"))
    assert grouped.counts["captions"] == len(COLOURS)
    assert grouped.metrics()["i2t_r1"] == grouped.metrics()["t2i_r1"] == 1.0


def test_items_average_to_the_metrics_and_clusters_are_named(opened):
    source, cache = opened
    config = RetrievalConfig(group="colour")
    report = evaluate_retrieval(tiny_dual(), source, cache, IMAGES, config)
    metrics = report.metrics()
    interval_of = intervals(report.scores())
    items = report.items()
    assert len({item["id"] for item in items}) == len(items)
    assert {item["cluster"] for item in items} == set(COLOURS)
    for name in ("all", "long:en"):
        for side in ("i2t", "t2i"):
            chosen = [
                item for item in items if item["part"] == name and item["side"] == side
            ]
            prefix = "" if name == "all" else f"{name}/"
            for k in (1, 5, 10):
                mean = sum(item[f"r{k}"] for item in chosen) / len(chosen)
                assert mean == pytest.approx(metrics[f"{prefix}{side}_r{k}"])
            interval = interval_of[f"{prefix}{side}_r1"]
            assert interval.mean == pytest.approx(metrics[f"{prefix}{side}_r1"])
            assert interval.clusters == len(COLOURS)


def test_broken_images_are_left_out_and_named(tmp_path):
    data = write_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "red-0.png").write_bytes(b"not an image")
    source = open_source(SourceConfig(path=str(data)))
    cache = EmbeddingCache.open(make_cache(data, directory=tmp_path / "cache"))
    report = evaluate_retrieval(tiny_dual(), source, cache, IMAGES)
    assert report.counts["left_out"] == 1
    assert report.counts["images"] == 11
    assert "red-0.png" in str(report.pairs.broken[0])
    assert report.pairs.keys[0] == "red-20.png"
    assert len(report.pairs.captions) == 11 * 4
    assert report.pairs.owner_M.tolist() == [
        image for image in range(11) for _ in range(4)
    ]


def test_during_training_the_model_comes_back_as_it_was(opened):
    dual = tiny_dual().train()
    dual.tower.eval()
    before = {name: module.training for name, module in dual.named_modules()}
    metrics = evaluate_retrieval(
        dual, *opened, IMAGES, RetrievalConfig(group="colour")
    ).metrics()
    assert (
        metrics
        == evaluate_retrieval(
            tiny_dual(), *opened, IMAGES, RetrievalConfig(group="colour")
        ).metrics()
    )
    assert {name: module.training for name, module in dual.named_modules()} == before
    assert all(parameter.grad is None for parameter in dual.parameters())


def test_kinds_and_fields_are_checked_before_the_work():
    rows = [
        Row(key, None, (Caption("x", "short"),), meta)
        for key, meta in (("a", {"g": 1}), ("b", {}))
    ]
    source = InMemorySource("two", Path(), rows)
    retrieval.check_measurable(
        source, RetrievalConfig(kinds=("short",), group="g", limit=1)
    )
    with pytest.raises(ValueError, match=r"--group g: .*sample 'b' has no field 'g'"):
        retrieval.check_measurable(source, RetrievalConfig(group="g"))
    with pytest.raises(
        ValueError, match=r"--kinds lng and --languages \(any\); known: short:en"
    ):
        retrieval.check_measurable(source, RetrievalConfig(kinds=("lng",)))


def test_the_command_prints_a_table_and_writes_a_score_file(world, tmp_path, capsys):
    data, cache, tower = world
    out = tmp_path / "scores.json"
    words = [
        str(tower),
        "--data",
        str(data),
        "--cache",
        str(cache),
        "--group",
        "colour",
    ]
    assert cli(["evaluate", *words, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "long:en" in printed
    assert f"wrote {out}" in printed
    scores = ScoreFile.read(out)
    assert scores.benchmark == "retrieval:pairs.jsonl"
    assert scores.counts["images"] == 12
    assert scores.provenance["group"] == "colour"
    source = open_source(SourceConfig(path=str(data)))
    opened_cache = EmbeddingCache.open(cache)
    config = RetrievalConfig(group="colour")
    expected = evaluate_retrieval(
        load_dual_encoder(tower), source, opened_cache, IMAGES, config
    )
    assert scores.metrics == expected.metrics()
    assert scores.items == expected.items()
    assert {item["side"] for item in scores.items} == {"i2t", "t2i"}


def test_the_command_refuses_another_teachers_cache(world, tmp_path, capsys):
    data, _, tower = world
    other = make_cache(
        data, identity=made_up(pooling="last"), directory=tmp_path / "other"
    )
    assert (
        cli(["evaluate", str(tower), "--data", str(data), "--cache", str(other)]) == 2
    )
    error = capsys.readouterr().err
    assert "pooling 'last' != 'mean'" in error
    assert "choose another --cache" in error


def test_a_given_llm_is_compared_though_everything_is_cached(tmp_path, capsys):
    """It is not loaded, but its files are not another's."""
    llm, tower = write_llm_and_tower(tmp_path)
    data = write_data(tmp_path / "data")
    words = ["evaluate", str(tower), str(data)]
    assert cli(words) == 0
    assert cli([*words, "--llm", str(llm)]) == 0
    other = write_llm(tmp_path / "other", seed=1)
    capsys.readouterr()
    assert cli([*words, "--llm", str(other)]) == 2
    error = capsys.readouterr().err
    assert f"{other} is not the tower's teacher: weights_sha256 " in error
    assert error.count("\n") == 1
    assert cli([*words, "--adapter", str(tmp_path / "data")]) == 2
    assert "is not a PEFT adapter" in capsys.readouterr().err


def test_two_processes_give_the_same_as_one(world, tmp_path):
    data, cache, tower = world
    words = [
        str(tower),
        "--data",
        str(data),
        "--cache",
        str(cache),
        "--batch-size",
        "5",
        "--json",
    ]
    assert cli(["evaluate", *words, str(tmp_path / "1.json")]) == 0
    ranks = [
        Command(["evaluate", *words, str(tmp_path / "2.json")], variables, ROOT)
        for variables in places(2)
    ]
    assert finish(ranks) == [0, 0], ranks[0].output
    alone, together = (
        json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2)
    )
    assert together["metrics"] == pytest.approx(alone["metrics"])
    assert [item["id"] for item in together["items"]] == [
        item["id"] for item in alone["items"]
    ]
