"""`llm2clip compare --plan`: what it says suffices, does; what it can't know, it says."""

import numpy as np
import pytest

from llava_integration.evaluator.benchmarks.benchmark import mean_statistic
from llava_integration.evaluator.compare.command import main
from llava_integration.evaluator.compare.planning import plan
from llava_integration.evaluator.compare.sides import load_side, with_common_task
from llava_integration.evaluator.compare.statistics import compare, pair
from llm2clip_plugin.contracts import ScoreFile
from llm2clip_plugin.errors import ContractError

SIMULATIONS = 100  # standard error of a power of 80 %: 4 %
SPREAD = 1.5  # points, over trainings


def experiment(rng, images, runs, effect):
    """(base, new) runs of right and wrong answers: each side has its images, a training its luck
    and its slips."""
    knows = rng.random((2, images)) < 0.5
    luck = rng.normal(0, SPREAD / 100, size=(2, runs))
    luck[1] += effect / 100
    sides = []
    for is_known, shifts in zip(knows, luck, strict=True):
        chance = np.where(is_known, 0.8, 0.2)
        sides.append(
            [(rng.random(images) < chance + shift).astype(float) for shift in shifts]
        )
    return sides


def write_side(folder, runs):
    for run, scores in enumerate(runs):
        items = [
            {"id": number, "score": float(score)} for number, score in enumerate(scores)
        ]
        record = ScoreFile(benchmark="gqa", metrics={}, items=items, model=folder.name)
        record.write(folder / f"{run}.scores.json")
    return load_side(folder)


@pytest.fixture(scope="module")
def pilot(tmp_path_factory):
    """Eight trainings a side on 800 images, without a difference."""
    folder = tmp_path_factory.mktemp("pilot")
    sides = experiment(np.random.default_rng(1), 800, 8, 0)
    return [
        write_side(folder / name, runs)
        for name, runs in zip(("base", "new"), sides, strict=True)
    ]


def test_as_many_images_as_planned_detect_the_effect(pilot):
    """The comparison itself, with the planned number of images, has the planned error, and finds
    the effect."""
    runs = 3
    (noise,), _ = plan(pilot)
    assert noise.spread == pytest.approx(SPREAD, rel=0.5)
    assert noise.spread_freedom == 14
    effect = 7.0
    images = noise.images_needed(effect, runs)
    assert images is not None
    assert (
        noise.detectable(images, runs) <= effect < noise.detectable(images * 0.9, runs)
    )
    rng = np.random.default_rng(runs)
    results = []
    for _ in range(SIMULATIONS):
        base, new = experiment(rng, images, runs, effect)
        names = [str(number) for number in range(images)]
        paired = pair(
            [mean_statistic(run) for run in base],
            [mean_statistic(run) for run in new],
            names,
        )
        results.append(compare(paired))
    error = np.mean([result.standard_error**2 for result in results]) ** 0.5
    assert error == pytest.approx(noise.error(images, runs)[0], rel=0.15)
    # Student's: runs are few
    assert np.mean([result.detectable for result in results]) == pytest.approx(
        effect, rel=0.1
    )
    assert 0.7 <= np.mean([result.p < 0.05 for result in results]) <= 0.95


def test_what_no_number_reaches_and_what_one_side_knows(pilot):
    (noise,), _ = plan(pilot, spread=2.0)
    # three runs that vary by 2 points can't show 1 point on any images
    assert noise.images_needed(1.0, 3) is None
    (alone,), _ = plan([load_side(pilot[0].path / "0.scores.json")])
    assert alone.spread is None
    assert alone.images_needed(1.0, 1) is not None
    # half right, correlation .5
    assert alone.image_error == pytest.approx(100 * (0.25 / 800) ** 0.5, rel=0.05)


def test_the_command(pilot, capsys, tmp_path):
    base, new = (str(side.path) for side in pilot)
    assert main([base, new, "--plan", "--effect", "3", "--runs", "2", "4"]) == 0
    output = capsys.readouterr().out
    rows = []
    for line in output.splitlines():
        if "| GQA" in line:
            rows.append([cell.strip() for cell in line.split("|")[1:4]])
    assert rows == [["GQA", "800", "2"], ["GQA", "800", "4"]]
    assert main([f"{base}/0.scores.json", "--plan"]) == 0
    assert "set --spread" in capsys.readouterr().out
    for words, said in (
        ([], "--plan"),
        (["--plan", "--effect", "0"], "--effect 0"),
        ([base, new, "--plan"], "two"),
    ):
        with pytest.raises(ValueError, match=said):
            main([base, *words])
    with pytest.raises(ContractError, match="10 questions"):
        plan([pilot[0], write_side(tmp_path / "other", [[1.0] * 10])])


def table_of(path, scores):
    lines = [f"{item},{score}" for item, score in enumerate(scores)]
    path.write_text("\n".join(["item,score", *lines]))
    return path


@pytest.mark.parametrize(
    "second", [True, False], ids=["equal sides", "one side, all right"]
)
def test_a_pilot_without_a_disagreement_is_not_a_promise(tmp_path, second):
    """It plans with the doubt that the comparison itself has: 40 equal scores detect 10 points."""
    side = load_side(table_of(tmp_path / "a.csv", [1] * 40))
    sides = (
        [side, load_side(table_of(tmp_path / "b.csv", [1] * 40))] if second else [side]
    )
    if second:
        sides = with_common_task(sides)
    (noise,), _ = plan(sides)
    statistic = mean_statistic([1.0] * 40)
    result = compare(
        pair([statistic], [statistic], [str(number) for number in range(40)])
    )
    assert noise.detectable(40, 1) == pytest.approx(result.detectable, rel=0.1)
    assert noise.images_needed(1.0, 1) > 1000


@pytest.mark.parametrize("images", [3, 40])
def test_no_difference_above_100_points_is_promised(tmp_path, capsys, images):
    path = table_of(tmp_path / "a.csv", [number % 2 for number in range(images)])
    assert main([str(path), "--plan"]) == 0
    (row,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| a ")
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    if images == 3:
        assert cells[3] == "none"
        assert "any difference with so few" in row
    else:
        assert 10 < float(cells[3]) < 50


def test_one_image_plans_nothing(tmp_path, capsys):
    path = table_of(tmp_path / "a.csv", [1])
    assert main([str(path), "--plan"]) == 0
    (row,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| a ")
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a", "1", "", "unknown", "unknown", "", "unknown from 1 image"]


def test_a_task_that_cannot_be_planned_is_a_note(tmp_path, capsys):
    """As in a comparison: the others are planned."""
    sides = []
    for name, count in (("base", 40), ("new", 10)):
        folder = tmp_path / name
        folder.mkdir()
        table_of(folder / "whole.csv", [0, 1] * 20)
        table_of(folder / "short.csv", [0, 1] * (count // 2))
        sides.append(str(folder))
    (tmp_path / "base" / "broken.csv").write_text("item,score\n1,inf\n2,1\n")
    table_of(tmp_path / "new" / "lone.csv", [1, 0])
    assert main([*sides, "--plan"]) == 0
    output = capsys.readouterr().out
    assert "| whole " in output
    assert "| short " not in output
    assert "- not planned: short: base and new share 10 questions of 40, 10" in output
    assert "broken.csv" in output
    assert "lone is not compared: only new has its scores" in output
    # what the note advises
    assert main([*sides, "--plan", "--min-overlap", "0.2"]) == 0
    assert "| short " in capsys.readouterr().out
    for side in sides:
        (tmp_path / side / "whole.csv").unlink()
    with pytest.raises(ContractError, match="share 10 questions"):
        main([*sides, "--plan"])
