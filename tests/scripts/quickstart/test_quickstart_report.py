"""The quickstart's report over real directories: tiny towers, random embeddings, a subset of the
built-in set."""

import dataclasses
import io
import json

import claims
import inputs
import longer
import measure
import numpy as np
import pytest
import torch
from PIL import Image
from quickstart_folders import IDENTITY, WIDTH, write_cache, write_run
from transformers import Dinov2Config, Dinov2Model

from llm2clip_plugin import load_dual_encoder
from llm2clip_plugin.data.images import ImageConfig
from llm2clip_plugin.data.samples import Caption
from llm2clip_plugin.errors import ContractError
from llm2clip_plugin.evaluate.features import EmbeddedPairs
from llm2clip_plugin.evaluate.ranks import rank_both
from llm2clip_plugin.evaluate.retrieval import evaluate_retrieval, report_retrieval
from llm2clip_plugin.vision.directory import DualConfig
from llm2clip_plugin.vision.dual import DualEncoder
from llm2clip_plugin.vision.export import export_tower
from llm2clip_plugin.vision.towers import load_tower, preprocessor_config

CONCEPTS = 9
LANGUAGES_TEST = "names in languages of neither stage, caption → image"
LONG = "test families, long captions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/, and towers: two seeds of "raw" and a control, none of them trained."""
    folder = tmp_path_factory.mktemp("quickstart-report")
    inputs.prepare(folder / "data", (5, 4, CONCEPTS))
    write_cache(folder / "data" / "all", folder / "data" / "cache" / "raw")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "tiny")
    for name, seed in (("raw", 0), ("raw", 1), ("shuffled", 1)):
        torch.manual_seed(seed)
        dual = DualEncoder(
            load_tower(folder / "tiny"),
            DualConfig(projection_dim=8, llm_width=WIDTH, pool="cls"),
        )
        teacher = dataclasses.asdict(IDENTITY)
        export_tower(
            dual,
            folder / "out" / "towers" / f"{name}-seed{seed}",
            origin="tiny",
            teacher=teacher,
        )
        write_run(folder / "out", f"{name}-seed{seed}")
    return folder


@pytest.fixture(scope="module")
def raw(folder) -> list[measure.Rows]:
    """Both seeds of "raw", measured."""
    caches = measure.open_caches(folder / "data")
    sets = measure.open_sets(folder / "data" / "all")
    return [
        measure.measure_tower(
            folder / "out" / "towers" / f"raw-seed{seed}", sets, caches
        )
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def pairs(folder) -> list[EmbeddedPairs]:
    """The test set in each style, embedded with seed 0 of "raw"."""
    path = folder / "out" / "towers" / "raw-seed0"
    cache = measure.open_caches(folder / "data")["raw"]
    dual = load_dual_encoder(path)
    images = ImageConfig.from_preprocessor(preprocessor_config(path))
    sources = measure.open_sets(folder / "data" / "all")["test"]
    return [
        evaluate_retrieval(
            dual, source, cache, images, measure.RETRIEVAL, quiet=True
        ).pairs
        for source in sources
    ]


def test_report_measures_every_tower_on_every_test(folder) -> None:
    (table, _), _ = claims.make_report(folder / "data", folder / "out")
    body = json.loads((folder / "out" / "headline.json").read_text(encoding="utf-8"))
    assert set(body["towers"]) == {"raw-seed0", "raw-seed1", "shuffled-seed1"}
    assert not body["headline"]
    unseen = (folder / "data/all/test-openmoji.tar").is_file()
    assert len(body["towers"]["raw-seed0"]) == 2 * sum(
        unseen or "unseen" not in test for test in measure.TESTS
    )
    # the same weights under two names
    assert body["towers"]["raw-seed1"] == body["towers"]["shuffled-seed1"]
    cells = table.splitlines()[2].split(" | ")
    assert " ± " in cells[1]
    assert " ± " not in cells[2]


def test_towers_that_learned_nothing_fail_the_smoke_test(folder, tmp_path) -> None:
    (tmp_path / "towers").mkdir()
    for name in (
        "raw",
        "shuffled",
    ):  # one tower under both names: no better than the control
        (tmp_path / "towers" / f"{name}-seed1").symlink_to(
            folder / "out" / "towers" / "raw-seed1"
        )
        write_run(tmp_path, f"{name}-seed1")
    _, (line,) = claims.make_report(folder / "data", tmp_path)
    assert line.startswith("'raw LLM, read well' reaches")
    assert "no tower of the control" in claims.failures({}, [])[0]


def test_every_style_is_a_gallery_of_its_own(raw, pairs) -> None:
    # 1 / rank of a caption's drawing among those of its style
    by_hand = []
    families = []
    for of_style in pairs:
        assert len({meta["style"] for meta in of_style.meta}) == 1
        assert len(of_style.meta) == CONCEPTS
        for number, (caption, owner) in enumerate(
            zip(of_style.captions, of_style.owner_M.tolist(), strict=True)
        ):
            if (caption.kind, caption.language) == ("long", "en"):
                order = (
                    (of_style.image_ND @ of_style.text_MD[number])
                    .argsort(descending=True)
                    .tolist()
                )
                by_hand.append(1 / (1 + order.index(owner)))
                families.append(of_style.meta[owner]["family"])
    measured = raw[0][f"{LONG}, caption → image"]
    assert measured.scores == pytest.approx(by_hand)
    assert len(by_hand) == 3 * CONCEPTS
    assert measured.clusters == families
    # a concept's caption is in the pool once, so image -> caption is one among so many concepts
    assert measured.chance == pytest.approx(np.mean(1 / np.arange(1, CONCEPTS + 1)))
    assert raw[0][f"{LONG}, image → caption"].chance == measured.chance
    languages = raw[0][LANGUAGES_TEST]
    assert len(languages.scores) == len(languages.clusters) == 11 * 3 * CONCEPTS


def test_ties_are_in_random_order() -> None:
    query = torch.ones(1, 2)
    items = torch.tensor([[2.0, 0], [1, 0], [1, 0], [1, 0], [0, 0]])
    ranks, _ = rank_both(query, items, torch.tensor([7]), torch.tensor([0, 7, 1, 7, 2]))
    # one above; two right ones and a wrong one share places 2 to 4: a right one is first in two
    # orders of three
    assert measure.reciprocal_ranks(ranks) == pytest.approx(
        [2 / 3 * 1 / 2 + 1 / 3 * 1 / 3]
    )


def test_claims_pair_the_seeds_and_say_what_is_not_shown(raw) -> None:
    towers = {
        "raw-seed0": raw[0],
        "raw-seed1": raw[1],
        "tuned-seed0": raw[1],
        "tuned-seed1": raw[0],
    }
    rows = claims.make_claims(claims.pair_tests("tower", towers))
    first = rows[0]
    assert first["name"] == claims.HEADLINE[0]
    assert len(rows) == len(raw[0])
    by_hand = (raw[1][LANGUAGES_TEST].scores - raw[0][LANGUAGES_TEST].scores).mean()
    assert by_hand != 0
    differences = {seed: row["difference"] for seed, row in first["by_seed"].items()}
    assert differences == pytest.approx({"0": by_hand, "1": -by_hand})
    assert first["difference"] == pytest.approx(0)
    assert not first["significant"]
    assert cells(claims.claims_table(rows))[0][-3].endswith("not significant")
    del towers["raw-seed0"], towers["tuned-seed1"]
    # no seed in common
    assert claims.make_claims(claims.pair_tests("tower", towers)) == []


def cells(table: str) -> list[list[str]]:
    """Of the rows below a table's head."""
    return [
        line.strip("| ").split(" | ")
        for line in table.splitlines()[2:]
        if line.startswith("| ")
    ]


def noisy(rng: np.random.Generator, gain: float) -> measure.Measured:
    """200 queries of 50 families, the mean moved by about ``gain``."""
    families = [f"family{number // 4}" for number in range(200)]
    return measure.Measured(
        scores=rng.random(200) + gain, clusters=families, chance=0.1
    )


def test_p_is_adjusted_for_all_rows_and_each_training_has_its_own() -> None:
    rng = np.random.default_rng(3)
    base = {seed: noisy(rng, 0.0) for seed in (0, 1)}
    tests = {
        f"gain {gain}": (base, {0: noisy(rng, gain), 1: noisy(rng, 0.0)})
        for gain in (0.4, 0.05, 0.03)
    }
    all_claims = claims.make_claims(tests)

    def by_hand(values: list[float]) -> list[float]:  # Holm 1979
        adjusted = [0.0] * len(values)
        most = 0.0
        for rank, index in enumerate(
            sorted(range(len(values)), key=values.__getitem__)
        ):
            most = adjusted[index] = max(
                most, min(1.0, (len(values) - rank) * values[index])
            )
        return adjusted

    assert [claim["p_adjusted"] for claim in all_claims] == pytest.approx(
        by_hand([claim["p"] for claim in all_claims])
    )
    assert [claim["p_adjusted"] for claim in all_claims] != pytest.approx(
        [claim["p"] for claim in all_claims]
    )
    for seed in (0, 1):
        alone = [
            {"": ({seed: base[seed]}, {seed: new[seed]})} for _, new in tests.values()
        ]
        claims_alone = [claims.make_claims(test)[0] for test in alone]
        of_seed = [claim["by_seed"][str(seed)] for claim in all_claims]
        assert [claim["difference"] for claim in of_seed] == pytest.approx(
            [claim["difference"] for claim in claims_alone]
        )
        assert [claim["p_adjusted"] for claim in of_seed] == pytest.approx(
            by_hand([claim["p"] for claim in claims_alone])
        )
    # in one training of two
    assert all_claims[0]["seeds_significant"] == 1
    assert not all_claims[0]["significant"]
    rows = cells(claims.claims_table(all_claims))
    assert [row[-3].split(",")[0] for row in rows] == [
        claims.p_value(claim["p_adjusted"]) for claim in all_claims
    ]
    better = {
        seed: test._replace(scores=test.scores + 0.1) for seed, test in base.items()
    }
    (significant,) = claims.make_claims({"better": (base, better)})
    assert significant["significant"]
    assert significant["better"] == 1
    assert cells(claims.claims_table([significant]))[0][-2:] == ["2 of 2", ".100"]


def shifted(base: measure.Measured, gain: float) -> measure.Measured:
    """The same queries, each with a score that is higher by ``gain``."""
    return base._replace(scores=base.scores + gain)


def test_trainings_of_one_seed_are_pairs() -> None:
    """Seeds that differ much on both sides, and by nearly as much on each: unpaired, nothing
    shows."""
    rng = np.random.default_rng(4)
    noise = [noisy(rng, 0.0) for _ in range(4)]
    base = {seed: shifted(noise[0], 0.5 * seed) for seed in range(4)}
    new = {}
    for seed in range(4):
        slip = 0.02 * noise[seed].scores
        new[seed] = base[seed]._replace(scores=base[seed].scores + 0.04 + slip)
    (claim,) = claims.make_claims({"teacher: gain": (base, new)})
    by_hand = np.mean([new[seed].scores - base[seed].scores for seed in range(4)])
    assert claim["difference"] == pytest.approx(by_hand)
    assert claim["tuned"] - claim["raw"] == pytest.approx(by_hand)
    assert claim["significant"]
    low, high = claim["interval"]
    assert 0.03 < low < by_hand < high < 0.07


def test_the_linear_map_is_a_column_of_each_row_that_has_it() -> None:
    rng = np.random.default_rng(5)
    base = noisy(rng, 0.0)
    rows = {"raw": {"row": base, "other": base}}
    for seed in range(3):
        tuned = shifted(noisy(rng, 0.0), 0.3)
        rows[f"tuned-seed{seed}"] = {"row": tuned, "other": tuned}
    for seed in range(2):  # fewer seeds than fine-tuned ones
        rows[f"map-seed{seed}"] = {"row": shifted(base, 0.3)}
    made = claims.make_claims(claims.pair_tests("teacher", rows))
    without = claims.claims_table(made)
    assert "linear map" not in without
    claims.add_map(made, claims.pair_tests("teacher", rows, "map"))
    first, second = made
    assert first["map"]["values"] == pytest.approx(
        [base.scores.mean() + 0.3] * 2, abs=1e-5
    )
    on_its_seeds = [rows[f"tuned-seed{seed}"]["row"].scores.mean() for seed in range(2)]
    assert first["map"]["difference"] == pytest.approx(
        np.mean(on_its_seeds) - base.scores.mean() - 0.3
    )
    assert "map" not in second
    table = claims.claims_table(made)
    assert table.count("linear map on the raw LLM") == 1
    (with_it, without_it) = cells(table)
    assert with_it[2].endswith(" (2 seeds)")
    assert with_it[6].endswith(
        f"p {claims.p_value(first['map']['p_adjusted'])}, not shown"
    )
    assert len(table.splitlines()[3].split("|")) == len(
        table.splitlines()[2].split("|")
    )
    assert without_it[0] == "teacher: other"


def test_seeds_are_those_that_all_tests_of_a_part_have() -> None:
    rng = np.random.default_rng(6)
    runs = {seed: noisy(rng, 0.0) for seed in range(3)}
    two = {seed: runs[seed] for seed in (0, 2)}
    tests = {
        "teacher: a": (runs, runs),
        "tower: a": (runs, two),
        "tower: b": (runs, runs),
    }
    made = {claim["name"]: claim for claim in claims.make_claims(tests)}
    assert {name: [*claim["by_seed"]] for name, claim in made.items()} == {
        "teacher: a": ["0", "1", "2"],
        "tower: a": ["0", "2"],
        "tower: b": ["0", "2"],
    }


def test_concepts_are_clean_whose_name_shares_no_stem_with_a_keyword(folder) -> None:
    source = measure.open_sets(folder / "data" / "all")["test"][0]
    samples = []
    for name, keywords in (
        ("grinning face", "smile, happy"),
        ("Smiling face", "grin, smile"),
        ("red car", "vehicle, cars"),
        ("sun", ""),
    ):
        captions = [Caption(name, "short", "en"), Caption("smile", "short", "de")]
        if keywords:
            captions.append(Caption(keywords, "keywords", "en"))
        sample = dataclasses.replace(
            source[0], captions=tuple(captions), meta={"concept": name}
        )
        samples.append(sample)
    # "car" and "cars" do not begin with the same four letters; "sun" has no keywords
    assert measure.clean_concepts(samples) == {"grinning face", "red car"}


def test_families_are_drawn_not_concepts(pairs) -> None:
    paired = [
        {**meta, "family": str(number // 2)}
        for number, meta in enumerate(pairs[0].meta)
    ]
    by_style = report_retrieval(
        dataclasses.replace(pairs[0], meta=paired), measure.RETRIEVAL
    )
    drawn = [meta["family"] for meta in paired]
    assert len(set(drawn)) < CONCEPTS
    for side in measure.SIDES:
        assert sorted(
            measure.tower_queries([by_style], "long", side).clusters
        ) == sorted(drawn)
    rows = {}
    for kind in ("short", "long", "keywords"):
        rows[kind, "en"] = {f"concept{n}": torch.randn(4) for n in range(6)}
    rows["short", "de"] = rows["short", "en"]
    family = {f"concept{n}": f"family{n // 2}" for n in range(6)}
    rows[measure.CLEAN, "en"] = rows["keywords", "en"]
    measured = measure.teacher_queries(rows, family)["name → long caption"]
    assert measured.clusters == [family[concept] for concept in rows["short", "en"]]


def test_a_tower_of_another_teacher_is_refused(folder, tmp_path) -> None:
    other = dataclasses.replace(IDENTITY, weights_sha256="1")
    write_cache(folder / "data" / "all", tmp_path / "cache" / "raw", other)
    sets = measure.open_sets(folder / "data" / "all")
    with pytest.raises(ContractError, match=other.fingerprint):
        measure.measure_tower(
            folder / "out" / "towers" / "raw-seed0", sets, measure.open_caches(tmp_path)
        )


@pytest.fixture(scope="module")
def long_towers(folder):
    """Both towers of "raw" after 200 steps: each is that of the other seed."""
    output = folder / "gate-200-steps"
    (output / "towers").mkdir(parents=True)
    for seed, other in ((0, 1), (1, 0)):
        source = folder / "out" / "towers" / f"raw-seed{other}"
        (output / "towers" / f"raw-seed{seed}").symlink_to(source)
        write_run(output, f"raw-seed{seed}")
        record = output / "runs" / f"raw-seed{seed}" / "run.json"
        text = record.read_text().replace('"max_steps": 50', '"max_steps": 200')
        record.write_text(text)
    return output


def test_towers_of_few_and_of_many_steps_are_paired_by_seed(
    folder, long_towers, raw
) -> None:
    # in any order
    outputs = [long_towers, folder / "out"]
    table = longer.make_report(folder / "data", outputs, None)
    rows = json.loads((long_towers / "longer.json").read_text())
    first = rows[0]
    assert first["test"] == longer.ENDPOINT
    assert first["seeds"] == [0, 1]
    scores = [float(of_seed[longer.ENDPOINT].scores.mean()) for of_seed in raw]
    assert first["old"] == pytest.approx(scores)
    assert first["new"] == pytest.approx(scores[::-1])
    # what one seed gains the other loses
    assert first["difference"] == pytest.approx(0, abs=1e-9)
    assert first["interval"][0] <= 0 <= first["interval"][1]
    assert [row["test"] for row in rows if "p_adjusted" in row] == [longer.ENDPOINT]
    assert "| 2 | 50 → 200 |" in table
    # one teacher alone: none is compared with another
    assert table.count("| test families |") == 1
    assert table.count(", not shown") == 1


def test_rendered_drawings_are_asked_with_the_captions_of_their_concepts(
    folder, long_towers, tmp_path
) -> None:
    source = measure.open_sets(folder / "data" / "all")["test"][0]
    concepts = [source[number].meta["concept"] for number in range(len(source))]
    # on the transparent ground of the real ones; the first concept has none
    for concept in concepts[1:]:
        drawing = Image.new("RGBA", (12, 12), (255, 0, 0, 0))
        drawing.putpixel((6, 6), (0, 0, 255, 255))
        name = f"{concept}-FE0F" if concept == concepts[1] else concept
        drawing.save(tmp_path / f"{name}.webp", lossless=True)
    redrawn = longer.Redrawn(source, tmp_path)
    assert len(redrawn) == len(concepts) - 1
    assert redrawn.captions(0) == source.captions(1)
    assert redrawn.locate(0) == source.locate(1)
    with Image.open(io.BytesIO(redrawn[0].read_image())) as picture:
        assert picture.size == (inputs.SIZE, inputs.SIZE)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
    outputs = [folder / "out", long_towers]
    table = longer.make_report(folder / "data", outputs, tmp_path)
    assert table.count("rendered style, long captions") == 2
    assert table.count("rendered style, names in languages") == 2
    with pytest.raises(FileNotFoundError, match="no drawing of a test concept"):
        longer.Redrawn(source, folder)


def test_towers_without_a_partner_or_of_the_same_steps_are_refused(
    folder, tmp_path
) -> None:
    out = folder / "out"
    with pytest.raises(FileNotFoundError, match="share no tower of raw, map, tuned"):
        longer.make_report(folder / "data", [out, tmp_path], None)
    (tmp_path / "towers").symlink_to(out / "towers")
    (tmp_path / "runs").symlink_to(out / "runs")
    with pytest.raises(ContractError, match="towers of 50 steps, as another folder"):
        longer.make_report(folder / "data", [out, tmp_path], None)


def test_each_number_of_steps_is_compared_with_the_next_lower_one(folder, raw) -> None:
    first, second = raw
    towers = {
        50: {"raw": {0: first, 1: second}, "tuned": {0: second}},
        200: {"raw": {0: second, 1: first}},
        800: {"raw": {1: second}, "tuned": {1: first}},
    }
    gains, others = longer.compare_all(longer.ENDPOINT, towers)
    compared = [(row["comparison"], row["steps"], row["seeds"]) for row in gains]
    title = measure.TEACHERS["raw"]
    assert compared == [(title, [50, 200], [0, 1]), (title, [200, 800], [1])]
    assert [row["seeds"] for row in others] == [[0], [1]]
    assert [row["comparison"].partition(" ")[0] for row in others] == ["50", "800"]
