"""README and benchmarks.md state what docs/claims.json holds; scripts/check_claims.py tells which numbers moved."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_intervals_widen_with_fewer_seeds():
    stated = [0.50, 0.52, 0.48, 0.51]
    assert check_claims.reach(stated, [0.5]) > check_claims.reach(stated, [0.5, 0.49, 0.52])
    assert check_claims.reach([0.3, 0.3], [0.3]) == check_claims.ROUNDING
    with pytest.raises(ValueError, match="one seed"):
        check_claims.reach([0.3], [0.3])
