"""The quickstart's report over real directories: tiny towers, random embeddings, a subset of the built-in set."""

from __future__ import annotations

import dataclasses
import json

import models
import pytest
import report
import shards
import torch
from scores import TESTS

from llm2clip_plugin.contracts import ContractError, TeacherIdentity
from llm2clip_plugin.data.cache.rows import caption_rows
from llm2clip_plugin.data.cache.writer import CacheWriter
from llm2clip_plugin.data.sources.open import SourceConfig, open_source
from llm2clip_plugin.data.sources.records import caption_hash
from llm2clip_plugin.vision.dual import DualConfig, DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower

WIDTH, CONCEPTS = 16, 9
IDENTITY = TeacherIdentity(
    llm="random",
    revision="",
    weights_sha256="0",
    adapter_sha256="",
    attention="causal",
    pooling="mean",
    layer=-1,
    prompt="",
    chat_template="",
    max_tokens=8,
    width=WIDTH,
)


def write_cache(data, directory, identity=IDENTITY) -> None:
    """A whole cache whose embeddings are random, each caption's decided by its text."""
    source = open_source(SourceConfig(path=str(data)))
    writer = CacheWriter(directory, identity)
    for shard in source.shards:
        samples = [source.captions(number) for number in range(shard.start, shard.start + shard.size)]
        rows = caption_rows(captions for _, captions in samples)
        texts = [caption.text for _, captions in samples for caption in captions]
        assert len(texts) == len(rows)
        vectors = [
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(abs(caption_hash(text)))) for text in texts
        ]
        writer.write_shard(shard.name, [key for key, _ in samples], rows, torch.stack(vectors))
    writer.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/, and towers: two seeds of "raw" and a control, none of them trained."""
    folder = tmp_path_factory.mktemp("quickstart-report")
    shards.prepare(folder / "data", shards.Part(concepts=(5, 4, CONCEPTS)))
    write_cache(folder / "data" / "all", folder / "data" / "cache" / "raw")
    models.build_tiny_tower(folder / "tiny", 28)
    for name, seed in (("raw", 0), ("raw", 1), ("shuffled", 1)):
        torch.manual_seed(seed)
        dual = DualEncoder(load_tower(folder / "tiny"), DualConfig(projection_dim=8, llm_width=WIDTH, pool="cls"))
        teacher = dataclasses.asdict(IDENTITY)
        export_tower(dual, folder / "out" / "towers" / f"{name}-seed{seed}", origin="tiny", teacher=teacher)
    return folder


def test_report_measures_every_tower_on_every_test(folder) -> None:
    found = report.make_report(folder / "data", folder / "out", ["a <note>"])
    body = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    assert {name: list(seeds) for name, seeds in body["towers"].items()} == {
        "raw": ["seed0", "seed1"],
        "shuffled": ["seed1"],
    }
    rows = list(TESTS) if (folder / "data/all/test-openmoji.tar").is_file() else list(TESTS)[:3]
    assert set(rows) <= set(body["chance"])
    # a concept's caption is in the pool once, so image -> caption is one among so many concepts
    assert body["chance"]["test families, names"]["i2t_r1"] == pytest.approx(1 / CONCEPTS)
    assert len(body["towers"]["raw"]["seed0"]["languages"]) == 11
    for scores in body["towers"]["raw"].values():
        assert all(0 <= value <= 1 for test in body["chance"] for value in scores[test].values())
    # the same weights under two names give the same numbers
    assert body["towers"]["raw"]["seed1"] == body["towers"]["shuffled"]["seed1"]

    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count('<div class="query">') == 13  # a long caption, a name, a name in eleven languages
    assert page.count("data:image/png;base64,") == 13 * report.PICTURES
    assert "a &lt;note&gt;" in page
    assert found.tables[0].head == ["retrieval", "LLM as it is (2 seeds)", "control: wrong pictures (1 seed)", "chance"]
    assert " ± " in found.tables[0].rows[0][1] and " ± " not in found.tables[0].rows[0][2]


def test_towers_that_learned_nothing_fail_the_smoke_test(folder, tmp_path) -> None:
    (tmp_path / "towers").mkdir()
    for name in ("raw", "shuffled"):  # one tower under both names: no better than the control
        (tmp_path / "towers" / f"{name}-seed1").symlink_to(folder / "out" / "towers" / "raw-seed1")
    (line,) = report.failures(report.make_report(folder / "data", tmp_path, []))
    assert line.startswith("R@10 of 'LLM as it is' is")


def test_page_pictures_are_the_best_and_the_right_ones_are_marked(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    tower = report.measure(folder / "out" / "towers" / "raw-seed0", sets, caches)
    pairs, source = tower.scores.pairs, sets["test"]
    query = report.choose_queries(pairs)[1]
    pictures = report.best_pictures(pairs, source, query)
    scores = pairs.image_ND @ pairs.text_MD[query]
    order = scores.argsort(descending=True)[: len(pictures)].tolist()
    assert [p.png for p in pictures] == [source[place].read_image() for place in order]
    wanted = pairs.meta[int(pairs.owner_M[query])]["concept"]
    assert [p.right for p in pictures] == [pairs.meta[place]["concept"] == wanted for place in order]


def test_every_style_is_a_gallery_of_its_own(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    scores = report.measure(folder / "out" / "towers" / "raw-seed0", sets, caches).scores
    pairs = scores.pairs
    hits = []  # by hand: a caption's best drawing of each style shows its concept
    for style in ("fluent", "noto", "twemoji"):
        drawn = [n for n, meta in enumerate(pairs.meta) if meta["style"] == style]
        for number, (caption, owner) in enumerate(zip(pairs.captions, pairs.owner_M.tolist(), strict=True)):
            if owner in drawn and (caption.kind, caption.language) == ("long", "en"):
                best = max(drawn, key=lambda n: float(pairs.image_ND[n] @ pairs.text_MD[number]))
                hits.append(float(best == owner))
    found, families = scores.hits("t2i")
    assert found.tolist() == hits and len(hits) == 3 * CONCEPTS
    assert families[:CONCEPTS] == [meta["family"] for meta in pairs.meta if meta["style"] == "fluent"]
    assert scores.part("test", "long")["t2i_r1"] == pytest.approx(sum(hits) / len(hits))


def test_gain_pairs_the_seeds_of_two_teachers(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    raw = [report.measure(folder / "out" / "towers" / f"raw-seed{seed}", sets, caches) for seed in (0, 1)]
    tuned = [dataclasses.replace(tower, name="tuned", seed=1 - tower.seed) for tower in raw]
    by_hand = raw[1].scores.hits("t2i")[0].mean() - raw[0].scores.hits("t2i")[0].mean()  # "tuned" 0 is raw 1
    assert by_hand != 0
    said = report.gain([*raw, *tuned])
    assert "caption → image 0.000 [" in said and f"(by seed {-by_hand:+.3f}, {by_hand:+.3f})" in said
    assert report.gain(raw) == "" and report.gain([raw[0], tuned[0]]) == ""  # no teacher, or no seed, in common


def test_a_tower_of_another_teacher_is_refused(folder, tmp_path) -> None:
    other = dataclasses.replace(IDENTITY, weights_sha256="1")
    write_cache(folder / "data" / "all", tmp_path / "raw", other)
    sets = report.open_sets(folder / "data" / "all")
    with pytest.raises(ContractError, match=other.fingerprint):
        report.measure(folder / "out" / "towers" / "raw-seed0", sets, report.open_caches(tmp_path))


def test_a_cache_that_a_killed_run_left_is_named_and_left_out(folder, tmp_path, capsys) -> None:
    write_cache(folder / "data" / "all", tmp_path / "raw")
    CacheWriter(tmp_path / "tuned-seed1", dataclasses.replace(IDENTITY, weights_sha256="1"))  # began, never finished
    (tmp_path / "tuned-seed2").mkdir()
    assert list(report.open_caches(tmp_path)) == ["raw"]
    said = capsys.readouterr().err
    assert (
        "tuned-seed1 is incomplete, skipped" in said
        and "tuned-seed2 is incomplete, skipped" in said
        and "raw" not in said
    )
    (tmp_path / "raw" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no complete embedding cache in"):
        report.open_caches(tmp_path)


def test_missing_parts_are_reported(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete embedding cache in"):
        report.make_report(tmp_path, folder / "out", [])
    with pytest.raises(FileNotFoundError, match="no exported towers"):
        report.make_report(folder / "data", tmp_path, [])
