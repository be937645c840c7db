"""A run's folder and other data: what was trained or measured before is not taken as theirs."""

from pathlib import Path

import pytest
from evaluate_world import write_data, write_llm_and_tower

from llm2clip_plugin.cli import main
from llm2clip_plugin.contracts import RunRecord

SMALL = ["--precision", "fp32", "--global-batch", "4", "--workers", "0"]
SMALL += ["--heads.steps", "2", "--heads.batch-size", "4", "--max-steps", "2"]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_llm_and_tower(tmp_path)
    for name in ("train", "held-out", "other"):
        write_data(tmp_path / name)
    return tmp_path


def embed(world: Path, name: str, *more: str) -> str:
    path = str(world / name / "pairs.jsonl")
    assert main(["embed", path, "--llm", str(world / "llm"), *more]) == 0
    return path


def reworded(world: Path, name: str) -> None:
    path = world / name / "pairs.jsonl"
    text = path.read_text(encoding="utf-8").replace("a red square", "a red thing")
    path.write_text(text, encoding="utf-8")


def test_a_tower_of_other_captions_is_not_this_runs(
    world: Path, capsys: pytest.CaptureFixture[str]
):
    data = embed(world, "train")
    words = ["train-tower", data, "--tower", str(world / "tower"), *SMALL]
    words += ["--output", str(world / "run")]
    assert main(words) == 0
    assert main(words) == 0  # finished
    reworded(world, "train")
    embed(world, "train", "--overwrite")
    capsys.readouterr()
    assert main(words) == 2
    assert "--allow-changed captions" in capsys.readouterr().err
    assert main([*words, "--allow-changed", "captions"]) == 0


def test_scores_of_other_held_out_data_are_left_out(
    world: Path, capsys: pytest.CaptureFixture[str]
):
    data = embed(world, "train")
    reworded(world, "other")
    words = ["train-tower", data, "--tower", str(world / "tower"), *SMALL]
    words += ["--output", str(world / "run"), "--validation"]
    assert main([*words, embed(world, "held-out")]) == 0
    first = RunRecord.read(world / "run" / "run.json")
    assert first.before
    capsys.readouterr()
    assert main([*words, embed(world, "other")]) == 0
    printed = capsys.readouterr()
    assert "its scores are left out" in printed.err
    assert "before -> after" not in printed.out
    second = RunRecord.read(world / "run" / "run.json")
    assert second.before == {}
    assert second.metrics.keys() == first.metrics.keys()
