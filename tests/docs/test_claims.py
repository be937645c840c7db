"""README and benchmarks.md state what docs/claims.json holds; scripts/check_claims.py tells which numbers moved."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm2clip_plugin.contracts import ScoreFile

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("check_claims", ROOT / "scripts" / "check_claims.py")
check_claims = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = check_claims
SPEC.loader.exec_module(check_claims)


TEN = Path(__file__).with_name("ten_trainings.json")  # stated before the raw LLM was read well: ten a side, real gains
WITH_TEN = (
    f"import sys, pathlib; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import check_claims; "
    f"check_claims.CLAIMS = pathlib.Path({str(TEN)!r}); sys.exit(check_claims.main())"
)


@pytest.fixture(autouse=True)
def ten_trainings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checker sees is tested where ten trainings a side are stated; the pages state what is recorded."""
    if not {"test_pages_state_what_was_recorded", "test_recording_changes_both_tables_and_nothing_else"} & {
        request.node.originalname
    }:
        monkeypatch.setattr(check_claims, "CLAIMS", TEN)


def headline(shift: float = 0.0) -> dict[str, list[dict[str, object]]]:
    """A quickstart's headline.json with the recorded values of the first two seeds, the fine-tuned ones shifted."""
    claims = []
    for name, claim in json.loads(check_claims.CLAIMS.read_text(encoding="utf-8")).items():
        by_seed = {str(seed): {"raw": claim["raw"][seed], "tuned": claim["tuned"][seed] + shift} for seed in range(2)}
        claims.append({**claim, "name": name, "by_seed": by_seed})
    return {"headline": claims[:3], "others": claims[3:]}


def run(folder: Path, headline: dict[str, object]) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / "headline.json").write_text(json.dumps(headline), encoding="utf-8")
    command = [sys.executable, "-c", WITH_TEN, folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pages_state_what_was_recorded():
    claims = json.loads(check_claims.CLAIMS.read_text(encoding="utf-8"))
    assert check_claims.stated_table(check_claims.README) == check_claims.table(claims)
    assert check_claims.stated_table(check_claims.BENCHMARKS) == check_claims.table(claims, full=True)
    assert all(len(claim["tuned"]) >= 3 for claim in claims.values())


def test_pages_state_what_was_recorded_of_llava():
    claims = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
    for page in (check_claims.README, check_claims.BENCHMARKS):
        assert check_claims.stated_table(page, check_claims.BEGIN_LLAVA) == check_claims.llava_table(claims)
    sides = [claim[side] for claim in claims.values() for side in check_claims.BEFORE_AFTER]
    assert all(len(values) >= 3 and not any(math.isnan(value) for value in values) for values in sides)
    models = {name.partition(":")[0] for name in claims}
    assert models == set(check_claims.LANGUAGE_MODELS.values())


def llava_folder(folder: Path, shift: float = 0.0) -> Path:
    """LLaVA's part of a quickstart's results with the recorded values of seeds 0 and 1, those after shifted."""
    stated = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
    for name, model in check_claims.LANGUAGE_MODELS.items():
        rows = []
        for claim, values in stated.items():
            if not claim.startswith(f"{model}: "):
                continue
            about = claim.removeprefix(f"{model}: ")
            kept = {key: values[key] for key in ("difference", "interval", "questions")}
            rows.append({**kept, "benchmark": f"miniature: {about}", "p_holm": values["p_adjusted"]})
            for side, seed in itertools.product(check_claims.BEFORE_AFTER, range(2)):
                reached = values[side][seed] + shift * (side == "after")
                metrics = {"word": 1.0, "above": reached} if "name" in about else {"accuracy": reached}
                made = ScoreFile(benchmark=f"miniature: {about}", metrics=metrics, items=[{"id": "a", "score": 1.0}])
                made.write(folder / name / "scores" / side / ("seed1" if seed else "") / f"{len(rows)}.scores.json")
        (folder / name / "compare").mkdir(parents=True)
        (folder / name / "compare" / "compare.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return folder


def moved(found: list[check_claims.Checked]) -> list[str]:
    return [one.name for one in found if not one.same]


def test_llavas_numbers_are_compared_by_training(tmp_path, capsys):
    (tmp_path / "headline.json").write_text(json.dumps(headline()), encoding="utf-8")
    assert moved(check_claims.check_all(tmp_path)[0]) == []
    assert capsys.readouterr().out.count("Not rerun: LLaVA with a language model of") == 2
    stated = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
    same = check_claims.measured_llava(llava_folder(tmp_path))
    assert {name: one["after"] for name, one in same.items()} == {n: one["after"][:2] for n, one in stated.items()}
    assert moved(check_claims.check_all(tmp_path)[0]) == []
    shutil.rmtree(tmp_path / "llava")
    shutil.rmtree(tmp_path / "llava-smollm2")
    llava_folder(tmp_path, shift=-60.0)
    names = moved(check_claims.check_all(tmp_path)[0])
    assert all(f"{model}: fraction of the gains" in names for model in check_claims.LANGUAGE_MODELS.values())


def test_recording_changes_both_tables_and_nothing_else(tmp_path, monkeypatch):
    claims = json.loads(check_claims.CLAIMS.read_text(encoding="utf-8"))
    whole = {name: getattr(check_claims, name).read_text(encoding="utf-8") for name in ("README", "BENCHMARKS")}
    monkeypatch.setattr(check_claims, "CLAIMS", tmp_path / "claims.json")
    for name, text in whole.items():
        path = tmp_path / f"{name}.md"
        begin = text.index(check_claims.BEGIN)
        path.write_text(text[:begin] + text[begin:].replace(" [+.", " [+.9", 1), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != text
        monkeypatch.setattr(check_claims, name, path)
    check_claims.record(claims)
    assert json.loads(check_claims.CLAIMS.read_text(encoding="utf-8")) == claims
    assert {name: getattr(check_claims, name).read_text(encoding="utf-8") for name in whole} == whole


def test_recording_llavas_numbers_keeps_the_control_beside_them(tmp_path, monkeypatch):
    stated = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
    assert sum("control" in claim for claim in stated.values()) >= 5
    for name in ("README", "BENCHMARKS", "CLAIMS_LLAVA"):
        monkeypatch.setattr(check_claims, name, Path(shutil.copy(getattr(check_claims, name), tmp_path)))
    check_claims.record_llava({name: {k: v for k, v in one.items() if k != "control"} for name, one in stated.items()})
    assert json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8")) == stated
    assert "random embeddings" in check_claims.stated_table(check_claims.README, check_claims.BEGIN_LLAVA)[0]


def test_a_number_that_moved_is_told(tmp_path):
    same = run(tmp_path / "same", headline())
    assert same.returncode == 0 and re.fullmatch(r"0 of \d+ numbers moved\n", same.stderr)
    lower = run(tmp_path / "moved", headline(shift=-0.1))
    assert lower.returncode == 1 and "tower: fraction of the gains" in lower.stderr
    assert lower.stdout.count("**moved**") >= len(headline()["headline"] + headline()["others"])


def test_a_level_that_rose_on_both_sides_is_told(tmp_path):
    """As by training on test shards: the differences stay."""
    leaked = headline()
    for claim in leaked["headline"] + leaked["others"]:
        for seed in claim["by_seed"].values():
            seed["raw"], seed["tuned"] = seed["raw"] + 0.2, seed["tuned"] + 0.2
    result = run(tmp_path / "leaked", leaked)
    assert result.returncode == 1 and "names, caption → image; raw" in result.stderr


def test_a_claim_that_is_not_measured_any_more_is_told(tmp_path):
    fewer = headline()
    fewer["others"].pop()
    result = run(tmp_path / "fewer", fewer)
    assert result.returncode == 1 and "missing: teacher: name → long caption" in result.stderr


def test_intervals_are_students_and_widen_with_fewer_seeds():
    """By hand: variances 2.9167e-4 of 4 and 2.3333e-4 of 3, pooled 2.6833e-4 with 5 degrees of freedom, t 2.5706."""
    stated = [0.50, 0.52, 0.48, 0.51]
    assert check_claims.reach(stated, [0.5, 0.49, 0.52]) == pytest.approx(
        2.5706 * math.sqrt(2.6833e-4 * 7 / 12), rel=1e-3
    )
    one_sided = check_claims.reach(stated, [0.5, 0.49, 0.52], sides=1)
    assert one_sided == pytest.approx(2.0150 * math.sqrt(2.6833e-4 * 7 / 12), rel=1e-3)
    assert check_claims.reach(stated, [0.5]) > check_claims.reach(stated, [0.5, 0.49, 0.52])
    assert check_claims.reach([0.3, 0.3], [0.3]) == check_claims.ROUNDING
    with pytest.raises(ValueError, match="one seed"):
        check_claims.reach([0.3], [0.3])


# ---------------------------------------------------------------------------------------------- planted reruns

Runs = dict[str, dict[str, list[float]]]


class Rerun:
    """Reruns of what is recorded: values of new trainings with the means and the covariance of the recorded ones."""

    def __init__(self, *, llava: tuple[str, ...]) -> None:
        self.claims = json.loads(check_claims.CLAIMS.read_text(encoding="utf-8"))
        of_llava = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
        self.llava = {name: claim for name, claim in of_llava.items() if name.startswith(llava or ("nothing",))}
        self.rng = np.random.default_rng(20261128)

    def draw(self, count: int | None = None) -> tuple[Runs, Runs]:
        """Towers and LLaVA of ``count`` new trainings; None: of as many as are recorded."""
        return tuple(
            {name: values for part in self.parts(claims) for name, values in self.of_part(part, sides, count).items()}
            for claims, sides in ((self.claims, check_claims.RAW_TUNED), (self.llava, check_claims.BEFORE_AFTER))
        )

    @staticmethod
    def parts(claims: Runs) -> list[Runs]:
        """The claims of each part, whose seeds vary together."""
        names = dict.fromkeys(map(check_claims.part_of, claims))
        return [{n: claim for n, claim in claims.items() if check_claims.part_of(n) == part} for part in names]

    def of_part(self, part: Runs, sides: tuple[str, str], count: int | None) -> Runs:
        value_KS = np.array([claim[side] for claim in part.values() for side in sides])
        off_KS, seeds = value_KS - value_KS.mean(1, keepdims=True), value_KS.shape[1]
        mix_SN = self.rng.standard_normal((seeds, count or seeds)) / math.sqrt(seeds - 1)
        drawn = iter((value_KS.mean(1, keepdims=True) + off_KS @ mix_SN).tolist())
        return {name: {side: next(drawn) for side in sides} for name in part}

    def flagged(self, new: tuple[Runs, Runs], stated: tuple[Runs, Runs] | None = None) -> bool:
        """Whether ``claims.sh`` would say that something moved."""
        known = [
            {name: {**claim, **drawn[name]} for name, claim in claims.items()} if stated else claims
            for claims, drawn in zip((self.claims, self.llava), stated or ({}, {}), strict=True)
        ]
        names = [name for claims in known for name in claims]
        levels = {"numbers": 2 * len(names), "parts": len(set(map(check_claims.part_of, names)))}
        sides = (check_claims.RAW_TUNED, check_claims.BEFORE_AFTER)
        return any(
            not one.same
            for claims, values, names in zip(known, new, sides, strict=True)
            for one in check_claims.check(claims, values, names, **levels)
        )


def with_gains(runs: Runs, sides: tuple[str, str], fraction: float, *, prefix: str = "") -> Runs:
    """The same trainings with a fraction of the mean gain of each claim whose name has the prefix."""
    changed = {}
    for name, values in runs.items():
        base, new = (np.array(values[side]) for side in sides)
        lost = (1 - fraction) * check_claims.fmean(stated_gain(name, sides)) if name.startswith(prefix) else 0.0
        changed[name] = {sides[0]: base.tolist(), sides[1]: (new - lost).tolist()}
    return changed


def stated_gain(name: str, sides: tuple[str, str]) -> list[float]:
    path = check_claims.CLAIMS if sides == check_claims.RAW_TUNED else check_claims.CLAIMS_LLAVA
    return check_claims.differences(json.loads(path.read_text(encoding="utf-8"))[name], sides)


BOTH, SMOL = ("2.5 million weights", "SmolLM2-135M"), ("SmolLM2-135M",)


@pytest.mark.parametrize(("llava", "count"), [(BOTH, 1), (BOTH, 3), ((), 1)])
def test_a_correct_rerun_passes_nine_times_in_ten(llava: tuple[str, ...], count: int):
    reruns = Rerun(llava=llava)
    flagged = sum(reruns.flagged(reruns.draw(count), stated=reruns.draw()) for _ in range(300))
    assert flagged / 300 <= 0.10


@pytest.mark.parametrize(
    ("broken", "llava", "count"),
    [
        ("both towers on the raw LLM", (), 1),
        ("after = before", BOTH, 1),
        ("half of the towers' gain", (), 1),
        ("half of LLaVA's gain", BOTH, 1),
        ("half of all gains", BOTH, 1),
    ],
)
def test_a_broken_method_is_flagged(broken: str, llava: tuple[str, ...], count: int):
    reruns, flagged = Rerun(llava=llava), 0
    for _ in range(200):
        towers, of_llava = reruns.draw(count)
        if broken == "both towers on the raw LLM":
            other = reruns.draw(count)[0]
            own = {name: {**values, "tuned": other[name]["raw"]} for name, values in towers.items()}
            towers |= {name: values for name, values in own.items() if name.startswith("tower")}
        elif broken == "after = before":
            other = reruns.draw(count)[1]
            of_llava = {name: {**values, "after": other[name]["before"]} for name, values in of_llava.items()}
        else:
            if "LLaVA" not in broken:
                prefix = "tower" if "tower" in broken else ""
                towers = with_gains(towers, check_claims.RAW_TUNED, 0.5, prefix=prefix)
            if "tower" not in broken:
                of_llava = with_gains(of_llava, check_claims.BEFORE_AFTER, 0.5)
        flagged += reruns.flagged((towers, of_llava))
    assert flagged / 200 >= 0.95
