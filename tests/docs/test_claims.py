"""README and benchmarks.md state what docs/claims.json holds; scripts/check_claims.py tells which numbers moved."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm2clip_plugin.contracts import ScoreFile

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("check_claims", ROOT / "scripts" / "check_claims.py")
check_claims = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_claims)


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
    command = [sys.executable, ROOT / "scripts" / "check_claims.py", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pages_state_what_was_recorded():
    claims = json.loads(check_claims.CLAIMS.read_text(encoding="utf-8"))
    assert check_claims.stated_table(check_claims.README) == check_claims.table(claims)
    assert check_claims.stated_table(check_claims.BENCHMARKS) == check_claims.full_table(claims)
    assert all(len(claim["tuned"]) >= 10 for claim in claims.values())


def test_pages_state_what_was_recorded_of_llava():
    claims = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
    for page in (check_claims.README, check_claims.BENCHMARKS):
        assert check_claims.stated_table(page, check_claims.BEGIN_LLAVA) == check_claims.llava_table(claims)
    sides = [claim[side] for claim in claims.values() for side in check_claims.LLAVA_SIDES]
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
            for side, seed in itertools.product(check_claims.LLAVA_SIDES, range(2)):
                reached = values[side][seed] + shift * (side == "after")
                metrics = {"word": 1.0, "above": reached} if "name" in about else {"accuracy": reached}
                made = ScoreFile(benchmark=f"miniature: {about}", metrics=metrics, items=[{"id": "a", "score": 1.0}])
                made.write(folder / name / "scores" / side / ("seed1" if seed else "") / f"{len(rows)}.scores.json")
        (folder / name / "compare").mkdir(parents=True)
        (folder / name / "compare" / "compare.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return folder


def test_llavas_numbers_are_compared_by_training(tmp_path, capsys):
    (tmp_path / "headline.json").write_text(json.dumps(headline()), encoding="utf-8")
    assert set(check_claims.check_all(tmp_path)) == {"as stated"}
    assert capsys.readouterr().out.count("Not rerun: LLaVA with a language model of") == 2
    stated = json.loads(check_claims.CLAIMS_LLAVA.read_text(encoding="utf-8"))
    same = check_claims.measured_llava(llava_folder(tmp_path))
    assert {name: one["after"] for name, one in same.items()} == {n: one["after"][:2] for n, one in stated.items()}
    assert set(check_claims.check_all(tmp_path)) == {"as stated"}
    shutil.rmtree(tmp_path / "llava")
    shutil.rmtree(tmp_path / "llava-smollm2")
    llava_folder(tmp_path, shift=-60.0)
    assert check_claims.check_all(tmp_path)["moved"] == len(stated)


def test_recording_changes_both_tables_and_nothing_else(tmp_path, monkeypatch):
    claims = json.loads(check_claims.CLAIMS.read_text(encoding="utf-8"))
    whole = {name: getattr(check_claims, name).read_text(encoding="utf-8") for name in ("README", "BENCHMARKS")}
    monkeypatch.setattr(check_claims, "CLAIMS", tmp_path / "claims.json")
    for name, text in whole.items():
        path = tmp_path / f"{name}.md"
        path.write_text(text.replace("+.056 [+.046, +.065]", "+.999 [+.046, +.065]"), encoding="utf-8")
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
    assert (same.returncode, same.stderr) == (0, "every number is within its interval\n")
    moved = run(tmp_path / "moved", headline(shift=-0.1))
    assert moved.returncode == 1 and moved.stdout.count("**moved**") == len(
        headline()["headline"] + headline()["others"]
    )


def test_a_claim_that_is_not_measured_any_more_is_told(tmp_path):
    fewer = headline()
    fewer["others"].pop()
    result = run(tmp_path / "fewer", fewer)
    assert result.returncode == 1 and "**missing**" in result.stdout


def test_one_number_in_twenty_may_move(tmp_path):
    """Binomial tails with p = .05: of 22 numbers, 4 or more lie outside in 2.2 % of runs, 3 or more in 9.5 %."""
    assert [check_claims.by_chance(numbers) for numbers in (0, 2, 22, 34)] == [0, 1, 3, 4]
    one = headline()
    for seed in one["headline"][0]["by_seed"].values():
        seed["tuned"] -= 0.1
    result = run(tmp_path / "one", one)
    assert result.returncode == 0 and result.stdout.count("**moved**") == 1
    assert result.stderr == "1 of 22 numbers moved; up to 3 may by chance\n"


def test_intervals_widen_with_fewer_seeds():
    stated = [0.50, 0.52, 0.48, 0.51]
    assert check_claims.reach(stated, [0.5]) > check_claims.reach(stated, [0.5, 0.49, 0.52])
    assert check_claims.reach([0.3, 0.3], [0.3]) == check_claims.ROUNDING
    with pytest.raises(ValueError, match="one seed"):
        check_claims.reach([0.3], [0.3])
