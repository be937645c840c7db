"""README and benchmarks.md state what docs/claims.json holds; scripts/check_claims.py tells which
numbers moved."""

import itertools
import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import check_claims
import claims_tables
import pytest

from llm2clip_plugin.contracts import ScoreFile

LANGUAGES = "tower: names in languages of neither stage, caption → image"
TINY = check_claims.LANGUAGE_MODELS["llava"]
LLAVAS = check_claims.read_json(check_claims.CLAIMS_LLAVA)
# that claims.sh reruns
TINYS = {name: claim for name, claim in LLAVAS.items() if name.startswith(TINY)}


@pytest.fixture
def ten_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stated before the raw LLM was read well: ten trainings a side, real gains, where the checker
    is tested."""
    monkeypatch.setattr(
        check_claims, "CLAIMS", Path(__file__).with_name("ten_trainings.json")
    )


def headline(shift: float = 0.0, both: float = 0.0) -> dict[str, list[dict]]:
    """A quickstart's headline.json with the values of the first two seeds; fine-tuned ones, or both
    sides, shifted."""
    claims = []
    for name, claim in check_claims.read_json(check_claims.CLAIMS).items():
        sides = {"raw": both, "tuned": shift + both}
        by_seed = {}
        for seed in range(2):
            by_seed[str(seed)] = {
                side: claim[side][seed] + more for side, more in sides.items()
            }
        random = [value + both for value in claim.get("random", ())]
        claims.append({**claim, "name": name, "by_seed": by_seed, "random": random})
    return {"headline": claims[:3], "others": claims[3:]}


def checked(folder: Path, made: dict) -> tuple[list[str], list[str]]:
    """The numbers that moved, and the claims that are missing."""
    (folder / "headline.json").write_text(json.dumps(made), encoding="utf-8")
    numbers, missing = check_claims.check_all(folder)
    return [number.name for number in numbers if not number.same], missing


def stated_table(page: Path, begin: str = check_claims.BEGIN) -> str:
    """The text between a page's markers."""
    after = page.read_text(encoding="utf-8").split(begin + "\n", 1)[1]
    return after[: after.index(check_claims.END)]


def test_pages_state_what_was_recorded() -> None:
    claims = check_claims.read_json(check_claims.CLAIMS)
    assert stated_table(check_claims.README) == check_claims.readme_table(
        check_claims.headline(claims)
    )
    assert stated_table(check_claims.BENCHMARKS) == check_claims.table(claims)
    assert stated_table(
        check_claims.BENCHMARKS, check_claims.BEGIN_LLAVA
    ) == check_claims.llava_table(LLAVAS)
    recorded = [(claims, check_claims.RAW_TUNED), (LLAVAS, check_claims.BEFORE_AFTER)]
    values = [
        claim[side]
        for stated, sides in recorded
        for claim in stated.values()
        for side in sides
    ]
    assert all(len(seeds) >= 6 and all(map(math.isfinite, seeds)) for seeds in values)


def llava_folder(folder: Path, shift: float = 0.0) -> None:
    """LLaVA's part of a quickstart's results with the recorded values of seeds 0 and 1, those after
    shifted."""
    shutil.rmtree(folder / "llava", ignore_errors=True)
    rows = []
    for claim, values in TINYS.items():
        benchmark = f"miniature: {claim.removeprefix(f'{TINY}: ')}"
        rows.append({**values, "benchmark": benchmark, "p_holm": values["p_adjusted"]})
        for side, seed in itertools.product(check_claims.BEFORE_AFTER, range(2)):
            accuracy = values[side][seed]
            if side == "after":
                accuracy += shift
            scores = ScoreFile(
                benchmark=benchmark,
                metrics={"accuracy": accuracy},
                items=[{"id": "a", "score": 1.0}],
            )
            run = folder / "llava" / "scores" / side / ("seed1" if seed else "")
            scores.write(run / f"{len(rows)}.scores.json")
    check_claims.write_text(
        folder / "llava" / "compare" / "compare.json", json.dumps({"rows": rows})
    )


def test_llavas_controls_are_recorded(tmp_path, monkeypatch) -> None:
    for name in ("CLAIMS_LLAVA", "README", "BENCHMARKS"):
        monkeypatch.setattr(
            check_claims, name, Path(shutil.copy(getattr(check_claims, name), tmp_path))
        )
    llava_folder(run := tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["check_claims.py", str(run), "--record", "llava"])
    with pytest.raises(FileNotFoundError, match="--controls"):
        check_claims.main()
    shutil.copytree(run / "llava" / "scores", run / "llava-controls" / "scores")
    for control, difference in (("random", 1.25), ("raw", -2.0)):
        rows = check_claims.read_json(run / "llava" / "compare" / "compare.json")[
            "rows"
        ]
        new = {
            "difference": difference,
            "interval": [difference - 3, difference + 3],
            "p_holm": 0.5,
        }
        path = run / f"llava-{control}" / "compare" / "compare.json"
        check_claims.write_text(path, json.dumps({"rows": [row | new for row in rows]}))
    assert check_claims.main() == 0
    made = check_claims.read_json(check_claims.CLAIMS_LLAVA)
    assert made.keys() == LLAVAS.keys()
    for (name, stated), (control, side) in itertools.product(
        TINYS.items(), check_claims.CONTROLS.items()
    ):
        recorded = made[name]["controls"][control]
        assert recorded["values"] == stated[side][:2] == made[name][side]
        assert recorded["difference"] == {"random": 1.25, "raw": -2.0}[control]
    assert stated_table(
        check_claims.BENCHMARKS, check_claims.BEGIN_LLAVA
    ) == check_claims.llava_table(made)
    assert (
        "; +1.2 [-1.8, +4.2], p .500 (paired "
        in check_claims.llava_table(made).splitlines()[2]
    )
    monkeypatch.undo()
    assert checked(run, headline()) == ([], [])
    llava_folder(run, shift=-60.0)  # and the controls as they were
    expected = {
        f"{TINY}: emoji group against raw; difference",
        "tower: test families, names, caption → image; random",
    }
    assert expected <= set(checked(run, headline(both=0.2))[0])


def with_linear_map(
    made: dict[str, list[dict]], seeds: int = 3
) -> dict[str, list[dict]]:
    """A headline.json whose claims have a linear map, ``seeds`` seeds of the raw LLM's value."""
    for claim in made["headline"] + made["others"]:
        value = claim["by_seed"]["0"]["raw"]
        values = [value - 0.001, value, value + 0.001][:seeds]
        difference = {"difference": 0.01, "interval": [-0.01, 0.03], "p_adjusted": 0.3}
        claim["map"] = {"values": values, **difference, "significant": False}
    return made


def test_the_linear_map_is_recorded_with_what_was_stated(tmp_path, monkeypatch) -> None:
    for name in ("CLAIMS", "README", "BENCHMARKS"):
        monkeypatch.setattr(
            check_claims, name, Path(shutil.copy(getattr(check_claims, name), tmp_path))
        )
    stated = check_claims.read_json(check_claims.CLAIMS)
    for claim in stated.values():
        claim.pop("map", None)
    check_claims.write_text(check_claims.CLAIMS, json.dumps(stated))
    assert "linear map" not in check_claims.readme_table(check_claims.headline(stated))
    run = tmp_path / "run"
    check_claims.write_text(run / "headline.json", json.dumps(without_map(headline())))
    monkeypatch.setattr(sys, "argv", ["check_claims.py", str(run), "--record", "map"])
    with pytest.raises(FileNotFoundError, match="--controls"):
        check_claims.main()
    check_claims.write_text(
        run / "headline.json", json.dumps(with_linear_map(headline()))
    )
    assert check_claims.main() == 0
    made = check_claims.read_json(check_claims.CLAIMS)
    assert {name: {**claim, "map": None} for name, claim in made.items()} == {
        name: {**claim, "map": None} for name, claim in stated.items()
    }
    row = stated_table(check_claims.README).splitlines()[2].split(" | ")
    value = next(iter(stated.values()))["raw"][0]
    assert row[2] == f"{check_claims.fraction(value)} ± .001 (3 seeds)"
    assert row[-1] == "+.010 [-.010, +.030], p .300, not shown |"
    assert stated_table(check_claims.BENCHMARKS) == check_claims.table(made)
    # a rerun's map is compared with it; one without the map is not missing anything
    assert checked(run, with_linear_map(headline())) == ([], [])
    assert checked(run, without_map(headline())) == ([], [])
    moved = with_linear_map(headline())
    moved["headline"][0]["map"]["values"] = [0.5, 0.5, 0.5]
    (name,), _ = checked(run, moved)
    assert name == f"{moved['headline'][0]['name']}; linear map"


def without_map(made: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A headline.json from before the linear map was a control."""
    for claim in made["headline"] + made["others"]:
        claim.pop("map", None)
    return made


def test_a_run_of_few_seeds_says_what_it_cannot_see(
    tmp_path, monkeypatch, capsys
) -> None:
    """A difference of .018 whose prediction interval for one seed is ± .029 would pass without
    it."""
    claim = check_claims.read_json(check_claims.CLAIMS)[LANGUAGES]
    assert claim["significant"]
    first_seed = {side: claim[side][:1] for side in check_claims.RAW_TUNED}
    levels = {"numbers": 22, "parts": 2}
    claims = {LANGUAGES: {**claim, "random": []}}
    difference = check_claims.check(
        claims, {LANGUAGES: first_seed}, check_claims.RAW_TUNED, **levels
    )[0]
    assert difference.same
    assert difference.hidden
    assert difference.most > abs(difference.stated)
    assert "would not see that it is lost" in check_claims.checked_table([difference])
    all_ten = check_claims.check(
        claims, {LANGUAGES: claim}, check_claims.RAW_TUNED, **levels
    )[0]
    assert not all_ten.hidden
    (tmp_path / "headline.json").write_text(json.dumps(headline()), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check_claims.py", str(tmp_path)])
    assert check_claims.main() == 0
    message = capsys.readouterr().err
    expected = f"{LANGUAGES}; difference ({check_claims.fraction(difference.stated)} ± "
    assert "too few seeds to see the loss of" in message
    assert expected in message
    assert "more --seeds" in message


def test_llavas_seeds_are_paired(capsys) -> None:
    """By hand: differences 1, 2, 3, 2 have mean 2 and deviation .8165, so t is 4.899 with 3
    degrees of freedom."""
    assert claims_tables.paired_t([5, 9, 1, 7], [6, 11, 4, 9]) == pytest.approx(
        0.01628, rel=1e-3
    )
    assert claims_tables.paired_t([1.0], [2.0]) == 1.0
    claim = {"before": [5, 9, 1, 7], "after": [6, 11, 4, 9]}
    values = {"values": [5, 9, 1, 7]}
    claims = {"a: x": claim, "a: y": claim, "b: x": claim}
    for with_control in claims.values():
        with_control["controls"] = {"random": values}
    for side in ("before", "random"):
        paired = claims_tables.paired_seeds(claims, side)
        # Holm over the rows of a language model
        assert paired["a: x"] == pytest.approx(2 * paired["b: x"])
        assert paired["b: x"] == pytest.approx(0.01628, rel=1e-3)


def test_numbers_that_moved_are_named(
    tmp_path, ten_trainings, monkeypatch, capsys
) -> None:
    assert checked(tmp_path, headline()) == ([], [])
    # leaves the pages alone if it is reached
    monkeypatch.setattr(check_claims, "record", lambda *_: None)
    monkeypatch.setattr(
        sys, "argv", ["check_claims.py", str(tmp_path), "--record", "towers"]
    )
    with pytest.raises(FileNotFoundError, match="--controls"):
        check_claims.main()
    assert capsys.readouterr().out.count("Not rerun: LLaVA") == 2
    moved, _ = checked(tmp_path, headline(shift=-0.1))
    assert "tower: fraction of the gains" in moved
    assert len(moved) > 11
    # levels
    assert (
        "tower: test families, names, caption → image; raw"
        in checked(tmp_path, headline(both=0.2))[0]
    )
    gone = (fewer := headline())["others"].pop()["name"]
    assert checked(tmp_path, fewer) == ([], [gone])
    llava_folder(tmp_path, shift=-60.0)
    assert f"{TINY}: fraction of the gains" in checked(tmp_path, headline())[0]


def test_intervals_are_students_and_widen_with_fewer_seeds() -> None:
    """By hand: variances 2.9167e-4 of 4 and 2.3333e-4 of 3, pooled 2.6833e-4 with 5 degrees of
    freedom, t 2.5706."""
    stated = [0.50, 0.52, 0.48, 0.51]
    new = [0.5, 0.49, 0.52]
    deviation = math.sqrt(2.6833e-4 * 7 / 12)
    assert check_claims.reach(stated, new) == pytest.approx(
        2.5706 * deviation, rel=1e-3
    )
    assert check_claims.reach(stated, new, sides=1) == pytest.approx(
        2.0150 * deviation, rel=1e-3
    )
    assert check_claims.reach(stated, [0.5]) > check_claims.reach(stated, new)
    assert check_claims.reach([0.3, 0.3], [0.3]) == check_claims.ROUNDING
    with pytest.raises(ValueError, match="one seed"):
        check_claims.reach([0.3], [0.3])


KINDS = {  # whose claims, their sides, how many trainings claims.sh makes
    "towers": (check_claims.RAW_TUNED, 1),
    "LLaVA": (check_claims.BEFORE_AFTER, 3),
}


def claims_of(kind: str) -> dict[str, dict]:
    return check_claims.read_json(check_claims.CLAIMS) if kind == "towers" else TINYS


def reruns(
    kind: str, *, stated_too: bool
) -> list[tuple[dict[str, dict], dict[str, dict]]]:
    """(claims, rerun) for every choice of recorded trainings as the rerun; the claims are stated by
    all trainings, or by the others."""
    claims = claims_of(kind)
    sides, count = KINDS[kind]
    seeds = range(len(next(iter(claims.values()))[sides[0]]))
    pairs = []
    for rerun_seeds in itertools.combinations(seeds, count):
        stated_seeds = [seed for seed in seeds if stated_too or seed not in rerun_seeds]
        stated = {}
        rerun = {}
        for name, claim in claims.items():
            stated[name] = claim | chosen(claim, sides, stated_seeds)
            rerun[name] = chosen(claim, sides, rerun_seeds)
        pairs.append((stated, rerun))
    return pairs


def chosen(
    claim: dict, sides: Sequence[str], seeds: Iterable[int]
) -> dict[str, list[float]]:
    """The values of some trainings, side by side."""
    values: dict[str, list[float]] = {side: [] for side in sides}
    for side, seed in itertools.product(sides, seeds):
        values[side].append(claim[side][seed])
    return values


def is_flagged(kind: str, stated: dict[str, dict], rerun: dict[str, dict]) -> bool:
    """Whether ``claims.sh`` would say that something moved."""
    names = [name for other in KINDS for name in claims_of(other)]
    levels = {
        "numbers": 2 * len(names),
        "parts": len(set(map(check_claims.part_of, names))),
    }
    checked = check_claims.check(stated, rerun, KINDS[kind][0], **levels)
    return not all(number.same for number in checked)


@pytest.mark.usefixtures("ten_trainings")
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_trainings_pass_as_a_rerun(kind: str) -> None:
    pairs = reruns(kind, stated_too=False)
    flagged = [rerun for stated, rerun in pairs if is_flagged(kind, stated, rerun)]
    assert len(flagged) <= 0.1 * len(pairs)


@pytest.mark.usefixtures("ten_trainings")
@pytest.mark.parametrize("kind", KINDS)
def test_a_method_without_effect_is_flagged(kind: str) -> None:
    """The second side is other trainings of the first."""
    (base, side), count = KINDS[kind]
    for stated, rerun in reruns(kind, stated_too=False):
        for name, values in rerun.items():
            values[side] = stated[name][base][:count]
        assert is_flagged(kind, stated, rerun)


@pytest.mark.usefixtures("ten_trainings")
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_gain_is_flagged(kind: str) -> None:
    sides, _ = KINDS[kind]
    for stated, rerun in reruns(kind, stated_too=True):
        for name, values in rerun.items():
            lost = fmean(check_claims.differences(stated[name], sides)) / 2
            values[sides[1]] = [value - lost for value in values[sides[1]]]
        assert is_flagged(kind, stated, rerun)
