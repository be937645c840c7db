"""From files to recall: parts, groups, the control, ranks, broken samples, the command."""

import json

import pytest
import torch
from evaluate_world import COLOURS, tiny_dual, write_data
from forked import Command
from tiny_data import made_up, make_cache
from tower_runs import ROOT, finish, places

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.cli import main as cli
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.data.cache import EmbeddingCache
from llm2clip_plugin.data.images import ImageConfig, Normalize, evaluation_pixels
from llm2clip_plugin.data.sources import SourceConfig, open_source
from llm2clip_plugin.evaluate.commands import intervals
from llm2clip_plugin.evaluate.config import RetrievalConfig
from llm2clip_plugin.evaluate.retrieval import evaluate_retrieval, recall

IMAGES = ImageConfig(size=32)


@pytest.fixture
def opened(world):
    data, cache, _ = world
    return open_source(SourceConfig(path=str(data))), EmbeddingCache.open(cache)


class Seeing(torch.nn.Module):
    """A dual encoder that reads the colour off the pixels and the words, to know the right answer of a measurement."""

    def __init__(self, source, cache):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.colours = torch.tensor(list(COLOURS.values())).float()
        self.concept = {}
        for index in range(len(source)):
            colour = source[index].meta["colour"]
            _, captions = source.captions(index)
            for row in cache.rows(*source.locate(index), captions):
                self.concept[row.numpy().tobytes()] = list(COLOURS).index(colour)

    def encode_image(self, pixels):
        colour = (pixels.mean((2, 3)) * torch.tensor(IMAGES.std) + torch.tensor(IMAGES.mean)) * 255
        nearest = torch.cdist(colour, self.colours).argmin(1)
        return torch.nn.functional.one_hot(nearest, len(COLOURS)).float()

    def encode_text(self, rows):
        index = torch.tensor([self.concept[row.numpy().tobytes()] for row in rows])
        return torch.nn.functional.one_hot(index, len(COLOURS)).float()


def test_all_and_parts_equal_recall_on_the_same_embeddings(opened):
    source, cache = opened
    dual = tiny_dual()
    report = evaluate_retrieval(dual, source, cache, IMAGES, RetrievalConfig(batch=5))
    pairs = report.pairs
    assert list(report.parts) == ["all", "short:en", "long:en", "short:de"]
    assert report.counts == {"images": 12, "captions": 48, "left_out": 0}
    metrics = report.metrics()
    assert {key: metrics[key] for key in metrics if "/" not in key} == recall(
        pairs.image_ND, pairs.text_MD, pairs.owner_M
    )
    part = torch.tensor([caption.kind == "long" for caption in pairs.captions])
    alone = recall(pairs.image_ND, pairs.text_MD[part], pairs.owner_M[part])
    assert {key.removeprefix("long:en/"): value for key, value in metrics.items() if key.startswith("long:en")} == alone
    with torch.no_grad():
        pixels = [torch.from_numpy(evaluation_pixels(source[index].read_image(), IMAGES)) for index in range(12)]
        expected = dual.encode_image(Normalize(IMAGES)(torch.stack(pixels)))
    assert torch.allclose(pairs.image_ND, expected, atol=1e-6)


def test_concepts_are_right_as_a_group_and_count_once_in_the_pool(opened):
    source, cache = opened
    seeing = Seeing(source, cache)
    alone = evaluate_retrieval(seeing, source, cache, IMAGES, RetrievalConfig(kinds=("short",), languages=("en",)))
    assert alone.metrics()["i2t_r1"] == pytest.approx(1 / 3)  # three images share the one right answer's embedding
    config = RetrievalConfig(kinds=("short",), languages=("en",), group="colour", control=True)
    grouped = evaluate_retrieval(seeing, source, cache, IMAGES, config)
    assert grouped.counts["captions"] == len(COLOURS)
    metrics = grouped.metrics()
    assert metrics["i2t_r1"] == metrics["t2i_r1"] == 1.0
    assert metrics["shuffled/i2t_r1"] == metrics["shuffled/t2i_r1"] == 0.0  # all of a group go to one other group
    assert metrics["chance/i2t_r1"] == pytest.approx(1 / 4)
    assert metrics["chance/t2i_r1"] == pytest.approx(1 / 4)


def test_items_average_to_the_metrics_and_clusters_are_named(opened):
    source, cache = opened
    config = RetrievalConfig(group="colour")
    report = evaluate_retrieval(tiny_dual(), source, cache, IMAGES, config)
    metrics, found, items = report.metrics(), intervals(report.scores()), report.items()
    assert len({item["id"] for item in items}) == len(items)
    assert {item["cluster"] for item in items} == set(COLOURS)
    for name in ("all", "long:en"):
        for side in ("i2t", "t2i"):
            chosen = [item for item in items if item["part"] == name and item["side"] == side]
            prefix = "" if name == "all" else f"{name}/"
            for k in (1, 5, 10):
                mean = sum(item[f"r{k}"] for item in chosen) / len(chosen)
                assert mean == pytest.approx(metrics[f"{prefix}{side}_r{k}"])
            interval = found[f"{prefix}{side}_r1"]
            assert interval.mean == pytest.approx(metrics[f"{prefix}{side}_r1"]) and interval.clusters == len(COLOURS)


def test_broken_images_are_left_out_and_named(tmp_path):
    data = write_data(tmp_path / "data")
    (tmp_path / "data" / "images" / "red-0.png").write_bytes(b"not an image")
    source = open_source(SourceConfig(path=str(data)))
    cache = EmbeddingCache.open(make_cache(data, directory=tmp_path / "cache"))
    report = evaluate_retrieval(tiny_dual(), source, cache, IMAGES)
    assert report.counts["left_out"] == 1 and report.counts["images"] == 11
    assert "red-0.png" in str(report.pairs.broken[0])
    assert report.pairs.keys[0] == "red-20.png" and len(report.pairs.captions) == 11 * 4
    assert report.pairs.owner_M.tolist() == [image for image in range(11) for _ in range(4)]


def test_during_training_the_model_comes_back_as_it_was(opened):
    dual = tiny_dual().train()
    dual.tower.eval()
    before = {name: module.training for name, module in dual.named_modules()}
    metrics = evaluate_retrieval(dual, *opened, IMAGES, RetrievalConfig(group="colour")).metrics()
    assert metrics == evaluate_retrieval(tiny_dual(), *opened, IMAGES, RetrievalConfig(group="colour")).metrics()
    assert {name: module.training for name, module in dual.named_modules()} == before
    assert all(parameter.grad is None for parameter in dual.parameters())


def test_the_command_prints_a_table_and_writes_a_score_file(world, tmp_path, capsys):
    data, cache, tower = world
    out = tmp_path / "scores.json"
    words = [str(tower), "--data", str(data), "--cache", str(cache), "--group", "colour", "--control"]
    assert cli(["evaluate", *words, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "long:en" in printed and "shuffled" in printed and f"wrote {out}" in printed
    scores = ScoreFile.read(out)
    assert scores.benchmark == "retrieval:pairs.jsonl"
    assert scores.counts["images"] == 12 and scores.provenance["group"] == "colour"
    source, opened_cache = open_source(SourceConfig(path=str(data))), EmbeddingCache.open(cache)
    config = RetrievalConfig(group="colour", control=True)
    expected = evaluate_retrieval(load_dual_encoder(tower), source, opened_cache, IMAGES, config)
    assert scores.metrics == expected.metrics() and scores.items == expected.items()
    assert {item["side"] for item in scores.items} == {"i2t", "t2i"}


def test_the_command_refuses_another_teachers_cache(world, tmp_path, capsys):
    data, _, tower = world
    other = make_cache(data, identity=made_up(pooling="last"), directory=tmp_path / "other")
    assert cli(["evaluate", str(tower), "--data", str(data), "--cache", str(other)]) == 2
    error = capsys.readouterr().err
    assert "pooling 'last' != 'mean'" in error and "choose another --cache" in error


def test_two_processes_give_the_same_as_one(world, tmp_path):
    data, cache, tower = world
    words = [str(tower), "--data", str(data), "--cache", str(cache), "--batch-size", "5", "--json"]
    assert cli(["evaluate", *words, str(tmp_path / "1.json")]) == 0
    ranks = [Command(["evaluate", *words, str(tmp_path / "2.json")], place, ROOT) for place in places(2)]
    assert finish(ranks) == [0, 0], ranks[0].output
    alone, together = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert together["metrics"] == pytest.approx(alone["metrics"])
    assert [item["id"] for item in together["items"]] == [item["id"] for item in alone["items"]]
