"""`llm2clip compare`: pairing by id, runs as seeds, Holm, wins, notes, every output; bad input
refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_mllm import BENCHMARKS, MODELS, ROOT, answers

from llava_integration.evaluator.benchmarks.bench import main_score as score
from llava_integration.evaluator.benchmarks.rules import benchmark
from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.multiplicity import holm
from llava_integration.evaluator.compare.sides import load_side, load_sides
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError

WAYS = ("image→text ", "text→image ")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Score files of both golden models, a folder each."""
    folder = tmp_path_factory.mktemp("scores")
    for model in MODELS:
        for name in BENCHMARKS:
            score(
                [
                    name,
                    "--data",
                    str(ROOT / name),
                    "--answers",
                    str(answers(name, model)),
                    "--json",
                    str(folder / model / f"{name}.scores.json"),
                ]
            )
    return folder


def written(folder, name, items, benchmark="gqa"):
    return ScoreFile(benchmark=benchmark, metrics={}, items=items, model=name).write(
        folder / f"{name}.scores.json"
    )


def simulated(folder, name, scores, benchmark="gqa", **more):
    items = [
        {"id": number, "score": value, "cluster": number, **more}
        for number, value in enumerate(scores)
    ]
    return written(folder, name, items, benchmark)


def test_golden_models(scored, tmp_path, capsys):
    """B is better on nearly every number; every output is written and says the same."""
    main(
        [
            str(scored / "model-a"),
            str(scored / "model-b"),
            "--output",
            str(tmp_path),
        ]
    )
    output = capsys.readouterr().out
    data = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    rows = {row["benchmark"]: row for row in data["rows"]}
    assert list(rows) == list(BENCHMARKS)
    for name, row in rows.items():
        record = ScoreFile.read(scored / "model-b" / f"{name}.scores.json")
        assert row["difference"] == pytest.approx(row["new_score"] - row["base_score"])
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["interval"] == [
            row["low"],
            row["high"],
        ]
        assert row["p_holm"] >= row["p"]
        assert row["wins"] + row["losses"] + row["ties"] == row["questions"]
        assert data["scores"][name]["model-b"] == pytest.approx(row["new_score"]), (
            record.metrics
        )
    assert rows["gqa"]["difference"] == pytest.approx(75.0 - 51.875)
    assert rows["gqa"]["verdict"] == "better"
    assert rows["mme"]["base_score"] == pytest.approx(1181.4285714)
    assert rows["mme"]["images"] == 54
    assert rows["pope"]["images"] == 17
    assert rows["scienceqa"]["questions"] < 165  # IMG alone
    assert rows["scienceqa"]["verdict"] == "no difference shown"
    for text in (output, (tmp_path / "compare.md").read_text()):
        assert "+23.1" in text
        assert "LLaVA-1.5 7B (official)" in text
    assert "detectable with 80 % power" in output
    assert "2 of 145 questions of vqav2 have no answer" in output
    markdown = (tmp_path / "compare.md").read_text().splitlines()
    table = [line for line in markdown if line.startswith("|")]
    # as many cells in each row
    assert len({line.count("|") - line.count("\\|") for line in table[:11]}) == 1


def test_composites_are_resampled_as_composites(scored):
    """The bootstrap of MME and POPE recomputes the published number, here by scoring resampled
    images naively."""
    rng = np.random.default_rng(0)
    numbers = {
        "mme": lambda items: benchmark("mme").metrics(items)["perception"],
        "pope": lambda items: (
            100 * benchmark("pope").metrics(items)["average_over_categories.f1"]
        ),
    }
    for name, number in numbers.items():
        items = ScoreFile.read(scored / "model-b" / f"{name}.scores.json").items
        statistic = benchmark(name).statistic(items)
        images = sorted({item["cluster"] for item in items})
        for _ in range(10):
            # 1 or 2 of each image
            counts = dict(zip(images, rng.integers(1, 3, len(images)), strict=True))
            weights = np.array([counts[item["cluster"]] for item in items], dtype=float)
            numbered = [
                (item, copy)
                for item in items
                for copy in range(counts[item["cluster"]])
            ]
            copies = [
                {**item, "cluster": f"{item['cluster']}#{copy}"}
                for item, copy in numbered
            ]
            assert float(statistic.value(weights @ statistic.sums)) == pytest.approx(
                number(copies)
            )


def test_order_of_items_does_not_matter(scored, tmp_path):
    record = ScoreFile.read(scored / "model-b" / "gqa.scores.json")
    turned = ScoreFile(**{**vars(record), "items": record.items[::-1]}).write(
        tmp_path / "turned.scores.json"
    )
    straight, other = (
        build(
            load_sides([scored / "model-a" / "gqa.scores.json", path], ["a", "b"])
        ).rows[0]
        for path in (scored / "model-b" / "gqa.scores.json", turned)
    )
    assert straight == other


def test_runs_below_a_folder_are_seeds(tmp_path):
    rng = np.random.default_rng(1)
    chance = rng.uniform(0.3, 0.7, 200)
    for side, gain in (("base", 0.0), ("new", 0.2)):
        for seed in range(3):
            simulated(
                tmp_path / side,
                f"seed{seed}",
                (rng.random(200) < chance + gain).astype(float).tolist(),
            )
    row = build(load_sides([tmp_path / "base", tmp_path / "new"], [])).rows[0]
    assert row.runs == (3, 3)
    assert row.result.spread_base > 0
    assert row.result.test == "t over images and runs"
    assert row.result.low > 0
    mean = np.mean(
        [100 * np.mean(run.scores) for run in load_side(tmp_path / "new").runs["gqa"]]
    )
    assert row.result.new == pytest.approx(mean)


def test_a_copied_score_file_is_not_a_second_run(tmp_path):
    first = simulated(tmp_path / "base", "seed0", [0, 1, 0, 1])
    shutil.copy(first, tmp_path / "base" / "copy.scores.json")
    (tmp_path / "base" / "link.scores.json").symlink_to(first)
    side = load_side(tmp_path / "base")
    assert len(side.runs["gqa"]) == 1
    assert len(side.notes) == 2
    assert all("not counted as another run" in note for note in side.notes)


def test_runs_with_equal_scores_are_runs(tmp_path):
    """Two of three runs have the same scores: the mean is over three."""
    for seed, scores in enumerate([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]):
        # of one model, with other answers
        folder = tmp_path / "files" / f"seed{seed}"
        simulated(folder, "model", scores, answer=f"of seed {seed}")
    lines = ["item,score,run"]
    for seed, scores in enumerate([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]):
        lines += [f"{item},{score},{seed}" for item, score in enumerate(scores)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    for side in (load_side(tmp_path / "files"), load_side(tmp_path / "t.csv")):
        (runs,) = side.runs.values()
        assert len(runs) == 3
        assert side.notes == ()
        assert np.mean([run.statistic.full() for run in runs]) == pytest.approx(200 / 3)


def test_a_grouping_counts_from_either_side(tmp_path):
    """`group` in one table alone: the interval is the same whichever is the base."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(15), 8)
    gain = rng.random(15)[images] < 0.5
    base = rng.random(120) < 0.4
    new = base | gain
    plain = [
        "item,score,task",
        *(f"{n},{int(right)},x" for n, right in enumerate(base)),
    ]
    grouped = [
        "item,score,task,group",
        *(f"{n},{int(right)},x,{images[n]}" for n, right in enumerate(new)),
    ]
    (tmp_path / "plain.csv").write_text("\n".join(plain))
    (tmp_path / "grouped.csv").write_text("\n".join(grouped))
    paths = [tmp_path / "plain.csv", tmp_path / "grouped.csv"]
    (there,) = build(load_sides(paths, [])).rows
    (back,) = build(load_sides(paths[::-1], [])).rows
    assert there.images == back.images == 15
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
    assert there.result.p == pytest.approx(back.result.p)
    assert any("which items go together" in note for note in there.notes)


def test_models_in_one_folder_are_no_runs(tmp_path):
    for model in ("llava-7b", "llava-13b"):
        simulated(tmp_path / "all", model, [0, 1, 0, 1])
    with pytest.raises(
        ContractError, match=r"2 models \(llava-13b, llava-7b\) on gqa.*--same-model"
    ):
        load_side(tmp_path / "all")
    assert len(load_side(tmp_path / "all", same_model=True).runs["gqa"]) == 2
    base = simulated(tmp_path, "base", [0, 1, 0, 0])
    assert main([str(base), str(tmp_path / "all"), "--same-model"]) == 0


def test_verdicts_follow_the_level_and_intervals_the_verdicts(tmp_path, capsys):
    """p is about .03 on each of three benchmarks, .08 when adjusted."""
    for name in "xyz":
        for side, wins, losses in (("base", 0, 3), ("new", 12, 0)):
            scores = [1] * wins + [0] * (12 - wins) + [1] * losses + [0] * (85 - losses)
            simulated(tmp_path / side, f"{name}-seed0", scores, benchmark=name)
    sides = [str(tmp_path / "base"), str(tmp_path / "new")]
    rows = build(load_sides(map_path(sides), [])).rows
    assert 0.05 / 3 < rows[0].result.p < 0.05
    assert rows[0].result.low > 0
    for row in rows:
        assert row.verdict == "no difference shown"
        assert row.interval[0] < 0
    wider = build(load_sides(map_path(sides), []), level=0.9).rows
    for row in wider:
        assert row.verdict == "better"
        assert row.interval[0] > 0
    assert main([*sides, "--level", "0.9", "--output", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    low, high = wider[0].interval
    assert "interval (Holm)" in output
    assert f"[+{low:.2f}, +{high:.2f}]" in output
    body = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"][0]
    assert body["interval_holm"] == [low, high]
    assert body["verdict"] == "better"


def map_path(names):
    return [Path(name) for name in names]


def test_names_are_text_in_markdown(tmp_path, capsys):
    base = simulated(tmp_path, "base", [0, 1] * 10, benchmark="my *own* <b>")
    new = simulated(tmp_path, "new", [1, 1] * 10, benchmark="my *own* <b>")
    names = ["--names", "a [link](x)\n# heading", "b | c"]
    assert main([str(base), str(new), *names]) == 0
    output = capsys.readouterr().out
    assert r"## b | c (new) against a \[link\](x) # heading (base)" in output
    assert r"- my \*own\* \<b>: 20 items" in output
    assert r"| my \\*own" not in output


def test_published_numbers_of_llava_stand_next_to_llava_alone(tmp_path):
    def references(name):
        sides = []
        for side in ("base", "new"):
            path = simulated(
                tmp_path / side, f"{name}-{side}", [0, 1] * 10, benchmark="gqa"
            )
            sides.append(load_side(path))
        return build(sides).references

    assert references("qwen") == {}
    assert references("llava-1.5") != {}


def test_percentages_against_shares_are_refused(tmp_path):
    for name, values in {
        "share": (0, 1),
        "percent": (0, 100),
        "judged": (0, 4),
    }.items():
        lines = [f"{n},{values[n % 2]},t" for n in range(20)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["item,score,task", *lines]))
    share, percent, judged = (
        load_side(tmp_path / f"{n}.csv") for n in ("share", "percent", "judged")
    )
    with pytest.raises(
        ContractError, match="scores on t are at most 1 in share and go to 100"
    ):
        build([share, percent])
    (warning,) = build([share, judged]).warnings
    assert "two scales" in warning
    assert build([share, share]).warnings == ()


def test_unknown_benchmark_and_bare_items_are_averaged(tmp_path):
    """A score file of one's own needs id, score and cluster alone; a composite without its fields
    says so."""
    for name in ("mine", "pope"):
        base = simulated(tmp_path, f"base-{name}", [0, 1, 0, 1] * 10, benchmark=name)
        new = simulated(tmp_path, f"new-{name}", [0, 1, 1, 1] * 10, benchmark=name)
        row = build(load_sides([base, new], [])).rows[0]
        assert row.result.base == 50.0
        assert row.result.new == 75.0
        assert any("mean score instead of" in note for note in row.notes) == (
            name == "pope"
        )


def test_retrieval_files_become_rows_by_direction(tmp_path):
    """The score files of `llm2clip evaluate`: R@1 and R@10 both ways, parts by themselves."""
    for name, hit in (("base", 0.0), ("new", 1.0)):
        items = [
            {
                "id": f"{part}/{side}/{n}",
                "part": part,
                "side": side,
                "cluster": str(n),
                "score": hit * (n % 2),
                "r1": hit * (n % 2),
                "r10": 1.0,
            }
            for part in ("all", "long:en")
            for side in ("i2t", "t2i")
            for n in range(20)
        ]
        written(tmp_path, name, items, "retrieval:emoji")
    paths = [tmp_path / "base.scores.json", tmp_path / "new.scores.json"]
    rows = build(load_sides(paths, [])).rows
    main([*map(str, paths), "--output", str(tmp_path / "out")])
    # no empty cards
    assert (
        "No question with an answer to show"
        in (tmp_path / "out" / "compare.html").read_text()
    )
    expected = {
        f"emoji {kind}R@1": 50.0 for way in WAYS for kind in (way, f"long:en {way}")
    }
    expected |= {f"emoji {way}R@10": 0.0 for way in WAYS}
    assert {row.title: row.result.difference for row in rows} == expected
    assert all(row.questions == 20 for row in rows)


def test_sugarcrepe_is_the_mean_over_its_groups(tmp_path):
    """As `llm2clip evaluate` reports it: a group of 3 items counts as much as one of 9."""
    for name, right in (("base", 0.0), ("new", 1.0)):
        items = [
            {"id": f"add_att/{n}", "score": right, "cluster": str(n), "part": "add_att"}
            for n in range(3)
        ]
        items += [
            {"id": f"add_obj/{n}", "score": 1.0, "cluster": str(n), "part": "add_obj"}
            for n in range(9)
        ]
        written(tmp_path, name, items, "retrieval:sugarcrepe")
    (row,) = build(
        load_sides([tmp_path / "base.scores.json", tmp_path / "new.scores.json"], [])
    ).rows
    assert row.title == "sugarcrepe"
    assert row.result.base == 50.0
    assert row.result.new == 100.0
    assert row.categories["add_att"] == (0.0, 1.0, 3)


def test_xm3600_is_the_mean_over_its_languages(tmp_path):
    """As `llm2clip evaluate` reports it; two captions an image in one language weigh no more than
    one in another."""
    for name, hit in (("base", 0.0), ("new", 1.0)):
        items = [
            {
                "id": f"{part}/{side}/{n}",
                "part": part,
                "side": side,
                "cluster": str(n % 5),
                "score": right,
                "r1": right,
                "r10": 1.0,
            }
            for part, count, right in (
                ("all", 15, 0.5),
                ("short:de", 10, hit),
                ("short:mi", 5, 0.0),
            )
            for side in ("i2t", "t2i")
            for n in range(count)
        ]
        written(tmp_path, name, items, "retrieval:xm3600")
    rows = build(
        load_sides([tmp_path / "base.scores.json", tmp_path / "new.scores.json"], [])
    ).rows
    expected = {f"xm3600 {way}R@1": (0.0, 50.0) for way in WAYS} | {
        f"xm3600 {way}R@10": (100.0, 100.0) for way in WAYS
    }
    assert {row.title: (row.result.base, row.result.new) for row in rows} == expected


def test_three_sides(scored, tmp_path):
    """Each NEW against BASE, or every two, Holm over all rows, names told apart."""
    other = shutil.copytree(scored / "model-b", tmp_path / "model-b")
    words = [str(scored / "model-a"), str(scored / "model-b"), str(other)]
    main([*words, "--output", str(tmp_path / "out")])
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(data["rows"]) == 18
    assert len(set(data["names"])) == 3
    assert [row["p_holm"] for row in data["rows"]] == holm(
        [row["p"] for row in data["rows"]]
    )
    assert "new side" in (tmp_path / "out" / "compare.html").read_text()
    main([*words, "--output", str(tmp_path / "all"), "--all-pairs"])
    rows = json.loads((tmp_path / "all" / "compare.json").read_text())["rows"]
    assert len(rows) == 27
    assert rows[-1]["base"] == data["names"][1]
    assert rows[-1]["difference"] == 0
    assert rows[-1]["p_holm"] == 1
    assert "against" in (tmp_path / "all" / "compare.html").read_text()


def test_other_questions_are_refused(tmp_path):
    base = simulated(tmp_path, "base", [0, 1] * 20)
    shifted = written(
        tmp_path, "new", [{"id": n + 20, "score": 1, "cluster": n} for n in range(40)]
    )
    with pytest.raises(
        ContractError,
        match=r"share 20 questions of 40, 40.*evaluate both on the same questions",
    ):
        main([str(base), str(shifted)])
    other = simulated(tmp_path, "truth-b", [0, 1], truth="yes")
    with pytest.raises(ContractError, match="the truth of question 0 is"):
        main([str(simulated(tmp_path, "truth-a", [0, 1], truth="no")), str(other)])


def test_benchmarks_of_different_weights_under_one_name_are_said(tmp_path, capsys):
    """As of a checkpoint that was trained again, and asked one of the benchmarks anew."""
    for side, weights in (("base", "aa"), ("new", "ab")):
        for name, sample in zip(("gqa", "pope"), weights, strict=True):
            settings = {"model_sample_sha256": sample}
            record = ScoreFile(
                benchmark=name,
                metrics={},
                items=[{"id": n, "score": n % 2} for n in range(9)],
                model=side,
                provenance={"answer_settings": settings},
            )
            record.write(tmp_path / side / f"{name}.scores.json")
    sides = [str(tmp_path / side) for side in ("base", "new")]
    assert main([*sides, "--output", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "new answered with different weights under one name (GQA; POPE)" in printed
    assert "base answered with different weights" not in printed


def test_other_annotations_are_said(tmp_path):
    for name, digest in (("base", "a"), ("new", "b")):
        about = {"model": name, "provenance": {"data_sha256": digest}}
        record = ScoreFile(
            benchmark="gqa",
            metrics={},
            items=[{"id": n, "score": n % 2} for n in range(9)],
            **about,
        )
        record.write(tmp_path / f"{name}.scores.json")
    (row,) = build(
        load_sides([tmp_path / f"{name}.scores.json" for name in ("base", "new")], [])
    ).rows
    assert any("different annotation files" in note for note in row.notes)


@pytest.mark.parametrize(
    "setting, base, new",
    [
        ("prompts", {"prompts": "prompts-1"}, {"prompts": "prompts-2"}),
        ("group", {"group": "none"}, {"group": "colour"}),
        ("train", {"train": "1"}, {"train": "2"}),
        ("k", {"settings": {"k": 10}}, {"settings": {"k": 20}}),
        ("pool", {"settings": {"pool": "cls"}}, {"settings": {"pool": "mean"}}),
    ],
)
def test_towers_that_were_measured_in_other_ways_are_said(
    tmp_path, capsys, setting, base, new
):
    sides = []
    for name, provenance in (("base", base), ("new", new)):
        record = ScoreFile(
            benchmark="probe",
            metrics={},
            items=[{"id": n, "score": n % 2} for n in range(9)],
            model=name,
            provenance=provenance,
        )
        sides.append(str(record.write(tmp_path / f"{name}.scores.json")))
    assert main(sides) == 0
    assert f"the sides differ in their {setting}, which" in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path):
    base = str(simulated(tmp_path, "base", [0, 1]))
    twice = written(tmp_path, "twice", [{"id": 1, "score": 1}, {"id": 1, "score": 0}])
    for new, kind, said in (
        (simulated(tmp_path, "other", [0, 1], benchmark="mme2"), ValueError, "mme2"),
        (tmp_path / "absent", FileNotFoundError, "absent"),
        (twice, ContractError, "item 1 twice"),
    ):
        with pytest.raises(kind, match=said):
            main([base, str(new)])


def test_scores_above_one_are_percentages_on_no_side(tmp_path):
    """A weak model's judged scores are all at most 1, which alone would read as a share."""
    for name, scores in {"weak": [0, 1, 1, 0], "strong": [3, 1, 4, 2]}.items():
        lines = [f"{n},{score},judged" for n, score in enumerate(scores)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["item,score,task", *lines]))
    result = build(
        [load_side(tmp_path / "weak.csv"), load_side(tmp_path / "strong.csv")]
    )
    (row,) = result.rows
    assert row.unit == "score"
    assert row.result.base == 0.5
    assert row.result.new == 2.5
    assert result.scores["judged"] == {"weak": 0.5, "strong": 2.5}
