"""A run's folder and other data: what was trained or measured before is not taken as theirs."""

import json
import shutil
from pathlib import Path

import pytest
from evaluate_world import square, write_data, write_llm_and_tower
from tiny_data import write_tar

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


def as_tars(rows: Path, folder: Path) -> Path:
    """The rows of a .jsonl in two tars, with the key of each as the name of its members."""
    shards: list[list[tuple[str, bytes]]] = [[], []]
    for number, line in enumerate(rows.read_text(encoding="utf-8").splitlines()):
        picture = (rows.parent / json.loads(line)["image"]).read_bytes()
        shards[number % 2] += [
            (f"{number}.png", picture),
            (f"{number}.json", line.encode()),
        ]
    for number, members in enumerate(shards):
        write_tar(folder / f"{number:05}.tar", members)
    return folder


@pytest.mark.parametrize("kind", ["rows", "tars"])
def test_a_tower_of_other_pictures_is_not_this_runs(
    kind: str, world: Path, capsys: pytest.CaptureFixture[str]
):
    rows = world / "train" / "pairs.jsonl"
    data = rows if kind == "rows" else as_tars(rows, world / "tars")
    assert main(["embed", str(data), "--llm", str(world / "llm")]) == 0
    words = ["train-tower", "--tower", str(world / "tower"), *SMALL]
    words += ["--output", str(world / "run"), "--data.path"]
    assert main([*words, str(data)]) == 0

    # the same data at another path
    moved = world / "moved"
    shutil.copytree(world / ("train" if kind == "rows" else "tars"), moved)
    copy = moved / rows.name if kind == "rows" else moved
    assert main([*words, str(copy), "--allow-changed", "data.path"]) == 0

    picture = world / "train" / "images" / "red-0.png"
    assert len(square("red", 1)) == picture.stat().st_size
    picture.write_bytes(square("red", 1))
    if kind == "tars":
        as_tars(rows, world / "tars")
    capsys.readouterr()
    back = [*words, str(data), "--allow-changed", "data.path"]
    assert main(back) == 2
    assert "pictures.1.content: '" in capsys.readouterr().err
    assert main([*back, "pictures"]) == 0


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
