"""Which models can be told apart, in letters; runs of equal number are paired."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from llava_integration.evaluator.benchmarks.benchmark import mean_statistic
from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.comparison import build
from llava_integration.evaluator.compare.estimate import Estimate
from llava_integration.evaluator.compare.multiplicity import letters
from llava_integration.evaluator.compare.sides import load_side, load_sides
from llava_integration.evaluator.compare.statistics import compare, pair, with_runs
from llm2clip_plugin.bootstrap import t_cdf
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError


def test_two_share_a_letter_if_and_only_if_they_are_not_told_apart():
    """Over all graphs of five models."""
    names = list("ABCDE")
    pairs = list(combinations(names, 2))
    for number in range(2 ** len(pairs)):
        told_apart = [pair for bit, pair in enumerate(pairs) if number >> bit & 1]
        labels = letters(names, told_apart)
        assert "a" in labels["A"]
        for pair_of_names in pairs:
            first, second = pair_of_names
            shares = bool(set(labels[first]) & set(labels[second]))
            assert shares == (pair_of_names not in told_apart), labels


def test_letters_of_piephos_kind():
    """A > C > E, neighbors not told apart: a, ab, b, bc, c."""
    told_apart = [
        ("A", "C"),
        ("A", "D"),
        ("A", "E"),
        ("B", "D"),
        ("B", "E"),
        ("C", "E"),
    ]
    labels = letters(list("ABCDE"), told_apart)
    assert labels == {"A": "a", "B": "ab", "C": "bc", "D": "cd", "E": "d"}


def score_files(folder, model, runs, names=None):
    """A side's folder, with a score file for each run."""
    for number, scores in enumerate(runs):
        items = [
            {"id": place, "score": float(score)} for place, score in enumerate(scores)
        ]
        name = names[number] if names else f"seed{number}"
        record = ScoreFile(benchmark="toy", metrics={}, items=items, model=model)
        record.write(folder / model / f"{name}.scores.json")
    return folder / model


def test_groups_are_in_every_report(tmp_path, capsys):
    """One model is worse; two are as good as one another."""
    rng = np.random.default_rng(0)
    chance = rng.uniform(0.3, 0.7, size=300)
    folders = []
    for model, gain in (("low", -0.25), ("one", 0.1), ("two", 0.1)):
        scores = rng.random(300) < chance + gain
        folders.append(str(score_files(tmp_path, model, [scores])))
    assert main([*folders, "--all-pairs", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "## Which models can be told apart?" in shown
    groups = json.loads((tmp_path / "out" / "compare.json").read_text())["groups"]
    assert groups["toy"] == {"low": "b", "one": "a", "two": "a"}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("<b>a</b>") == 2
    assert page.count("<b>b</b>") == 1
    # with the base alone, no two others are compared
    assert build(load_sides([tmp_path / "low", tmp_path / "one"], [])).groups == {}


def tables_of(folder, **sides):
    """Paths of tables; of each side the tasks, each with the items that it has. Of 200 items, in
    B every one is right, in C every third, in others two of three."""
    paths = []
    for side, tasks in sides.items():
        lines = ["item,score,task"]
        for task, items in tasks.items():
            for item in items:
                right = {"B": 1, "C": item % 3 == 0}.get(side, item % 3 > 0)
                lines.append(f"{item},{int(right)},{task}")
        path = folder / f"{side}.csv"
        path.write_text("\n".join(lines))
        paths.append(str(path))
    return paths


# sides of three or four models: what notes say, and the benchmarks that have letters
UNEVEN = {
    "two sides that share too few items": (
        {
            "A": {"t": range(200), "u": range(200)},
            "B": {"t": range(190), "u": range(200)},
            "C": {"t": range(10, 200), "u": range(200)},
        },
        [
            "t has no letters, since B and C are not compared (t: B and C share 180 questions of "
            "190, 190; evaluate both on the same questions, or lower --min-overlap)"
        ],
        {"u"},
    ),
    "a side that shares no benchmark": (
        {
            "A": {"t": range(200)},
            "B": {"t": range(200)},
            "C": {"t": range(200)},
            "D": {"v": range(200)},
        },
        [
            f"not compared: {side} (t) and D (v) have no benchmark in common"
            for side in "ABC"
        ],
        {"t"},
    ),
    "a benchmark that two sides have": (
        {
            "A": {"t": range(200), "u": range(200)},
            "B": {"t": range(200), "u": range(200)},
            "C": {"t": range(200)},
        },
        [
            f"u is not compared between {side} and C: only {side} has its scores"
            for side in "AB"
        ],
        {"t", "u"},
    ),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_sides_that_do_not_all_have_the_same(tmp_path, case):
    """What is not compared is a note that names both sides; it is not "not told apart"."""
    sides, expected, lettered = UNEVEN[case]
    paths = tables_of(tmp_path, **sides)
    overlap = ["--min-overlap", "0.949"]
    out = tmp_path / "out"
    assert main([*paths, "--all-pairs", *overlap, "--output", str(out)]) == 0
    report = json.loads((out / "compare.json").read_text())
    assert set(expected) <= set(report["notes"])
    assert set(report["groups"]) == lettered
    for name in lettered:
        assert set(report["groups"][name]) <= {"A", "B", "C"}
    rows = [row for row in report["rows"] if row["benchmark"] == "t"]
    assert len(rows) == (2 if "t" not in lettered else 3)


def test_an_error_if_no_two_sides_can_be_compared(tmp_path):
    sides = {name: {name.lower(): range(9)} for name in "ABC"}
    with pytest.raises(ValueError, match="no benchmark in common"):
        main([*tables_of(tmp_path, **sides), "--all-pairs"])


# BASE, NEW, and whether they are one
COPIES = {
    "one path": ("B.csv", "B.csv", True),
    "the same bytes": ("B.csv", "copy.csv", True),
    "the same scores": ("B.csv", "spaced.csv", False),
}


@pytest.mark.parametrize("case", COPIES)
def test_base_that_is_new(tmp_path, case):
    base, new, is_one = COPIES[case]
    (path,) = tables_of(tmp_path, B={"t": range(20)})
    content = Path(path).read_text()
    (tmp_path / "copy.csv").write_text(content)
    (tmp_path / "spaced.csv").write_text(f"{content}\n")
    notes = build(load_sides([tmp_path / base, tmp_path / new], [])).notes
    assert any("have the same files on t" in note for note in notes) == is_one


def runs_with_seeds(rng, count, shared, own):
    """(M, N) of both sides, whose seeds move the accuracy together."""
    of_seed = rng.normal(0, shared, size=(count, 1))
    sides = []
    for _ in range(2):
        chance = 0.5 + of_seed + rng.normal(0, own, size=(count, 1))
        sides.append((rng.random((count, 200)) < chance).astype(float))
    return sides


def test_paired_runs_are_students_where_images_agree():
    """Runs alone vary: the paired t test of their differences, by hand; unpaired, Welch's."""
    images = Estimate(center=11, error=0, freedom=49, skew=0, count=50, span=100)
    base_M = np.array([10.0, 30.0, 20.0, 60.0])
    difference_M = np.array([8.0, 12.0, 9.0, 15.0])
    paired = with_runs(images, [difference_M], [0.0])
    error = difference_M.std(ddof=1) / 2
    assert (paired.error, paired.freedom) == pytest.approx((error, 3))
    assert paired.p() == pytest.approx(2 * (1 - t_cdf(11 / error, 3)))
    unpaired = with_runs(images, [base_M, base_M + difference_M], [0.0, 0.0])
    assert paired.p() < 0.05 < unpaired.p()


def test_the_slips_of_paired_runs_are_those_of_their_differences():
    """Two paired runs with equal differences: the variance is at least that of their slips."""
    base = np.zeros((2, 30))
    new = np.zeros((2, 30))
    new[0, :10] = 1.0
    new[1, 10:20] = 1.0
    sides = []
    for runs in (base, new):
        sides.append([mean_statistic(run) for run in runs])
    result = compare(pair(*sides, [str(place) for place in range(30)]), pair_runs=True)
    assert result.test == "t over images and paired runs"
    assert result.difference == pytest.approx(100 / 3)
    assert result.estimate.freedom < 10
    assert result.standard_error > 5


def test_runs_are_matched_by_number(tmp_path):
    """seed10 of one side goes with seed10 of the other, whatever the order of their files."""
    rng = np.random.default_rng(1)
    base, new = runs_with_seeds(rng, 4, 0.1, 0.0)
    numbers = [1, 2, 3, 10]
    score_files(tmp_path, "base", base, [f"seed{number}" for number in numbers])
    names = [
        f"{letter}-seed{number}" for letter, number in zip("dcba", numbers, strict=True)
    ]
    score_files(tmp_path, "new", new, names)
    row = build(
        [load_side(tmp_path / side) for side in ("base", "new")], pair_runs=True
    ).rows[0]
    differences = 100 * (new.mean(axis=1) - base.mean(axis=1))
    expected = compare(
        pair(
            [mean_statistic(run) for run in base],
            [mean_statistic(run) for run in new],
            [str(place) for place in range(200)],
        ),
        pair_runs=True,
    )
    assert row.result.difference == pytest.approx(differences.mean())
    assert row.result.p == pytest.approx(expected.p)


def test_runs_of_tables_are_matched_by_their_column(tmp_path):
    """The column `run`, in another order on the other side."""
    rng = np.random.default_rng(4)
    base, new = runs_with_seeds(rng, 3, 0.1, 0.0)
    for name, runs, order in (("base", base, (0, 1, 2)), ("new", new, (2, 0, 1))):
        lines = ["item,score,run"]
        for seed in order:
            lines += [
                f"{place},{score},{seed}" for place, score in enumerate(runs[seed])
            ]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    sides = [load_side(tmp_path / f"{name}.csv") for name in ("base", "new")]
    (row,) = build(sides, pair_runs=True).rows
    statistics = []
    for runs in (base, new):
        statistics.append([mean_statistic(run) for run in runs])
    names = [str(place) for place in range(200)]
    expected = compare(pair(*statistics, names), pair_runs=True)
    assert row.result.p == pytest.approx(expected.p)


def test_runs_that_do_not_match_are_refused(tmp_path):
    base, new = runs_with_seeds(np.random.default_rng(2), 3, 0.0, 0.0)
    score_files(tmp_path, "base", base)
    score_files(tmp_path, "two", new[:2])
    score_files(tmp_path, "other", new, ["seed0", "seed1", "seed7"])
    score_files(tmp_path, "unnumbered", new, ["x", "y", "z"])

    def compared(side):
        sides = [load_side(tmp_path / name) for name in ("base", side)]
        return build(sides, pair_runs=True).rows[0]

    with pytest.raises(ContractError, match="base has 3 runs and two 2"):
        compared("two")
    with pytest.raises(ContractError, match="other has 0, 1, 7"):
        compared("other")
    (note,) = compared("unnumbered").notes
    assert note.startswith("not all runs of unnumbered have a number of their own")


def test_pairing_finds_what_seeds_hide():
    """Seeds that move both sides by 5 points hide a gain of 4; paired, they do not. Without a gain,
    1,000 simulations: scripts/benchmarks/coverage.py."""
    rng = np.random.default_rng(3)
    names = [str(place) for place in range(2000)]
    shown_paired = 0
    shown_unpaired = 0
    for _ in range(20):
        of_seed = rng.normal(0, 0.05, size=(5, 1))
        difficulty = rng.uniform(0.2, 0.7, size=2000)
        base = rng.random((5, 2000)) < difficulty + of_seed
        new = rng.random((5, 2000)) < difficulty + of_seed + 0.04
        sides = []
        for right in (base, new):
            sides.append([mean_statistic(run.astype(float)) for run in right])
        both = pair(*sides, names)
        shown_paired += compare(both, pair_runs=True).p < 0.05
        shown_unpaired += compare(both).p < 0.05
    assert shown_paired > 15 > 8 > shown_unpaired
