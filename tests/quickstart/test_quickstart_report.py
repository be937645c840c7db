"""The quickstart's report over real directories: tiny towers, random embeddings, a subset of the built-in set."""

from __future__ import annotations

import dataclasses
import json

import claims
import models
import numpy as np
import pictures
import pytest
import report
import results
import scores
import shards
import torch
from quickstart_folders import IDENTITY, WIDTH, write_adapter, write_cache, write_run

from llm2clip_plugin.data.cache import CacheWriter
from llm2clip_plugin.evaluate.retrieval import rank_both
from llm2clip_plugin.files import ContractError
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.family import DualConfig
from llm2clip_plugin.vision.towers import load_tower

CONCEPTS = 9


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
        write_run(folder / "out", f"{name}-seed{seed}")
    return folder


def test_report_measures_every_tower_on_every_test(folder) -> None:
    found = report.make_report(folder / "data", folder / "out", ["a <note>"])
    body = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    assert {name: list(seeds) for name, seeds in body["towers"].items()} == {
        "raw": ["seed0", "seed1"],
        "shuffled": ["seed1"],
    }
    rows = (
        list(scores.TESTS)
        if (folder / "data/all/test-openmoji.tar").is_file()
        else [t for t in scores.TESTS if "unseen" not in t]
    )
    assert set(rows) <= set(body["chance"])
    # a concept's caption is in the pool once, so image -> caption is one among so many concepts
    assert body["chance"]["test families, names"]["i2t_r1"] == pytest.approx(1 / CONCEPTS)
    assert len(body["towers"]["raw"]["seed0"]["languages"]) == 11
    for found_scores in body["towers"]["raw"].values():
        assert all(0 <= value <= 1 for test in body["chance"] for value in found_scores[test].values())
    # the same weights under two names give the same numbers
    assert body["towers"]["raw"]["seed1"] == body["towers"]["shuffled"]["seed1"]

    page = (folder / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count('<div class="query">') == 13  # a long caption, a name, a name in eleven languages
    assert page.count("data:image/png;base64,") == 13 * pictures.PICTURES
    assert "a &lt;note&gt;" in page
    assert found.tables[0].head == [
        "retrieval",
        "raw LLM, read well (2 seeds)",
        "control: wrong pictures (1 seed)",
        "chance",
    ]
    assert " ± " in found.tables[0].rows[0][1] and " ± " not in found.tables[0].rows[0][2]


def test_towers_that_learned_nothing_fail_the_smoke_test(folder, tmp_path) -> None:
    (tmp_path / "towers").mkdir()
    for name in ("raw", "shuffled"):  # one tower under both names: no better than the control
        (tmp_path / "towers" / f"{name}-seed1").symlink_to(folder / "out" / "towers" / "raw-seed1")
        write_run(tmp_path, f"{name}-seed1")
    (line,) = results.failures(report.make_report(folder / "data", tmp_path, []))
    assert line.startswith("R@10 of 'raw LLM, read well' is")


def test_page_pictures_are_the_best_and_the_right_ones_are_marked(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    tower = report.measure(folder / "out" / "towers" / "raw-seed0", sets, caches)
    pairs, source = tower.scores.pairs, sets["test"]
    query = pictures.choose_queries(pairs)[1]
    shown = pictures.best_pictures(pairs, source, query)
    scores = pairs.image_ND @ pairs.text_MD[query]
    order = scores.argsort(descending=True)[: len(shown)].tolist()
    assert [p.png for p in shown] == [source[place].read_image() for place in order]
    wanted = pairs.meta[int(pairs.owner_M[query])]["concept"]
    assert [p.right for p in shown] == [pairs.meta[place]["concept"] == wanted for place in order]


def test_every_style_is_a_gallery_of_its_own(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    measured = report.measure(folder / "out" / "towers" / "raw-seed0", sets, caches).scores
    pairs = measured.pairs
    by_hand = []  # 1 / rank of a caption's drawing among those of its style
    for style in ("fluent", "noto", "twemoji"):
        drawn = [n for n, meta in enumerate(pairs.meta) if meta["style"] == style]
        for number, (caption, owner) in enumerate(zip(pairs.captions, pairs.owner_M.tolist(), strict=True)):
            if owner in drawn and (caption.kind, caption.language) == ("long", "en"):
                order = sorted(drawn, key=lambda n: -float(pairs.image_ND[n] @ pairs.text_MD[number]))
                by_hand.append(1 / (1 + order.index(owner)))
    found = measured.queries("test families, long captions", "t2i")
    assert found.scores == pytest.approx(by_hand) and len(by_hand) == 3 * CONCEPTS
    assert found.clusters[:CONCEPTS] == [meta["family"] for meta in pairs.meta if meta["style"] == "fluent"]
    assert measured.part("test", "long")["t2i_r1"] == pytest.approx(np.mean([score == 1 for score in by_hand]))
    assert found.chance == pytest.approx(np.mean(1 / np.arange(1, CONCEPTS + 1)))
    test = "names in languages never trained on"
    languages, places = measured.queries(test, "t2i"), measured.places(test)
    assert [1 / one.place for one in places] == pytest.approx(languages.scores.tolist())  # without ties
    assert {one.caption.language for one in places} == set(measured.languages)
    assert len(languages.scores) == len(languages.clusters) == 11 * 3 * CONCEPTS


def test_ties_are_in_random_order() -> None:
    query, items = torch.ones(1, 2), torch.tensor([[2.0, 0], [1, 0], [1, 0], [1, 0], [0, 0]])
    ranks, _ = rank_both(query, items, torch.tensor([7]), torch.tensor([0, 7, 1, 7, 2]))
    # one above; two right ones and a wrong one share places 2 to 4: a right one is first in two orders of three
    assert claims.reciprocal_ranks(ranks) == pytest.approx([2 / 3 * 1 / 2 + 1 / 3 * 1 / 3])


def test_claims_pair_the_seeds_and_say_what_is_not_shown(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    raw = [report.measure(folder / "out" / "towers" / f"raw-seed{seed}", sets, caches) for seed in (0, 1)]
    tuned = [dataclasses.replace(tower, name="tuned", seed=1 - tower.seed) for tower in raw]
    made = results.in_order(claims.make_claims(report.tower_claims([*raw, *tuned])))
    first = made[0]
    assert first.name == results.HEADLINE[0] and len(made) == 2 * len(raw[0].scores.tests())
    test = "names in languages never trained on"
    by_hand = (raw[1].scores.queries(test, "t2i").scores - raw[0].scores.queries(test, "t2i").scores).mean()
    assert by_hand != 0
    each = {seed: difference.difference for seed, difference in first.by_seed.items()}
    assert each == pytest.approx({0: by_hand, 1: -by_hand}) and first.difference.difference == pytest.approx(0)
    assert not first.significant and "NOT significant" in claims.headline(first)
    assert claims.claims_table(made, report.TEACHERS).rows[0][-1].endswith("not significant")
    assert first.better + first.worse <= 1 and first.better == pytest.approx(first.worse)
    plain = [dataclasses.replace(tower, name="plain") for tower in raw]
    over = claims.make_claims(report.tower_claims([*raw, *tuned, *plain], "plain"))  # the same towers under its name
    assert [one.difference for one in over] == [
        one.difference for one in claims.make_claims(report.tower_claims([*raw, *tuned]))
    ]
    assert report.tower_claims([*raw, *tuned], "plain") == {}
    duels = pictures.page_duels([*raw, *tuned], sets["test"])
    assert len(duels) == pictures.DUELS and duels == pictures.page_duels([*raw, *tuned], sets["test"])
    places = {(one.caption.text, one.place) for one in raw[0].scores.places(test)}
    assert all((duel.text, duel.raw) in places and duel.pool == CONCEPTS for duel in duels)
    assert pictures.page_duels(raw, sets["test"]) == []
    assert report.tower_claims(raw) == {} and claims.make_claims(report.tower_claims([raw[0], tuned[0]])) == []


def test_a_difference_of_every_query_is_significant() -> None:
    families = [f"family{number // 4}" for number in range(200)]
    base = np.random.default_rng(0).random(200)
    sides = [
        {seed: claims.Measured(scores=side, clusters=families, chance=0.1) for seed in (0, 1)}
        for side in (base, base + 0.1)
    ]
    better, same = claims.make_claims({"better": tuple(sides), "same": (sides[0], sides[0])})
    assert better.significant and better.seeds_significant == 2 and better.difference.difference == pytest.approx(0.1)
    assert not same.significant and claims.as_record(same)["significant"] is False
    assert claims.seeds_table([better, same]).rows[0][-1] == "2 of 2"


def noisy(rng: np.random.Generator, gain: float) -> claims.Measured:
    """200 queries of 50 families, the mean moved by about ``gain``."""
    families = [f"family{number // 4}" for number in range(200)]
    return claims.Measured(scores=rng.random(200) + gain, clusters=families, chance=0.1)


def test_p_is_adjusted_for_all_rows_and_each_training_has_its_own() -> None:
    rng = np.random.default_rng(3)
    base = {seed: noisy(rng, 0.0) for seed in (0, 1)}
    tests = {f"gain {gain}": (base, {0: noisy(rng, gain), 1: noisy(rng, 0.0)}) for gain in (0.4, 0.05, 0.03)}
    made = claims.make_claims(tests)

    def by_hand(values: list[float]) -> list[float]:  # Holm 1979
        order, adjusted, most = (
            sorted(range(len(values)), key=values.__getitem__),
            dict.fromkeys(range(len(values))),
            0.0,
        )
        for rank, place in enumerate(order):
            most = adjusted[place] = max(most, min(1.0, (len(values) - rank) * values[place]))
        return [adjusted[place] for place in range(len(values))]

    assert [one.p for one in made] == pytest.approx(by_hand([one.difference.p for one in made]))
    assert [one.p for one in made] != pytest.approx([one.difference.p for one in made])
    for seed in (0, 1):
        own = [
            claims.make_claims({"": ({seed: base[seed]}, {seed: new[seed]})})[0].difference for _, new in tests.values()
        ]
        assert [one.by_seed[seed].difference for one in made] == pytest.approx([one.difference for one in own])
        assert [one.p_by_seed[seed] for one in made] == pytest.approx(by_hand([one.p for one in own]))
    assert made[0].seeds_significant == 1 and not made[0].significant  # in one training of two
    shown = claims.claims_table(made, report.TEACHERS).rows
    assert [row[-1].split(",")[0] for row in shown] == [claims.p_value(one.p) for one in made]


def test_families_are_drawn_not_concepts(folder) -> None:
    caches, sets = report.open_caches(folder / "data" / "cache"), report.open_sets(folder / "data" / "all")
    pairs = report.measure(folder / "out" / "towers" / "raw-seed0", sets, caches).scores.pairs
    paired = [{**meta, "family": str(number // 2)} for number, meta in enumerate(pairs.meta)]
    by_style = scores.report_retrieval(
        scores.of_style(dataclasses.replace(pairs, meta=paired), "noto"), scores.RETRIEVAL
    )
    part = by_style.parts["long:en"]
    drawn = [meta["family"] for meta in paired if meta["style"] == "noto"]
    assert len(set(drawn)) < CONCEPTS
    for side in scores.SIDES:
        assert sorted(scores.query_scores([(by_style, part)], side).clusters) == sorted(drawn)
    rows = {(kind, "en"): {f"concept{n}": torch.randn(4) for n in range(6)} for kind in ("short", "long", "keywords")}
    family = {f"concept{n}": f"family{n // 2}" for n in range(6)}
    found = scores.teacher_queries(rows, family, ["name → long caption"])["name → long caption"]
    assert found.clusters == [family[concept] for concept in rows["short", "en"]]


def test_centered_is_after_subtracting_each_sides_mean() -> None:
    torch.manual_seed(0)
    kinds, concepts, common = ("short", "long", "keywords"), range(30), 3 * torch.randn(8)
    of_concept = torch.randn(30, 8)
    rows = {
        (kind, "en"): {str(n): of_concept[n] + 0.7 * torch.randn(8) + place * common for n in concepts}
        for place, kind in enumerate(kinds)
    }
    found = scores.teacher_scores({**rows, ("short", "de"): rows["short", "en"]})
    query, item = (torch.stack(list(rows[kind, "en"].values())) for kind in ("short", "long"))
    for label, sides in (("plain", (query, item)), ("centered", (query - query.mean(0), item - item.mean(0)))):
        unit = [torch.nn.functional.normalize(side, dim=1) for side in sides]
        right = (unit[0] @ unit[1].T).argmax(1) == torch.arange(30)
        assert found[f"name → long caption, {label}"] == pytest.approx(float(right.float().mean()))
    assert found["name → long caption, centered"] > found["name → long caption, plain"]


def test_the_teachers_alone_are_the_first_result(folder, tmp_path) -> None:
    (tmp_path / "all").symlink_to(folder / "data" / "all")
    write_cache(folder / "data" / "all", tmp_path / "cache" / "raw")
    (alone,) = report.first_result(tmp_path)
    assert [row[0] for row in alone.rows][:3] == [f"{test}, plain" for test in scores.TEACHER_TESTS]
    write_cache(folder / "data" / "all", tmp_path / "cache" / "tuned-seed0", write_adapter(tmp_path))
    both = report.first_result(tmp_path)[1]
    assert len(both.rows) == 3 and both.rows[0][0] == results.HEADLINE[1]
    # the same embeddings under two names
    assert {row[4] for row in both.rows} == {"+.000 [+.000, +.000]"}


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
