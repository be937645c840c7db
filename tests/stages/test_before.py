"""The scores before training: in metrics.jsonl, in the last line, on the card; and the run is the
same without them."""

from pathlib import Path

import pytest
import torch
from tiny_data import WIDTH, make_all
from tower_runs import lines, losses

from llm2clip_plugin.cli import run
from llm2clip_plugin.contracts import RunRecord, TowerCard
from llm2clip_plugin.data import remote
from llm2clip_plugin.stages import tower
from llm2clip_plugin.vision.dual import load_dual

SMALL = ("--precision", "fp32", "--global-batch", "16", "--workers", "0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("before"), "dinov2")


def train(tiny: Path, output: Path, *more: str) -> list[dict]:
    """A run of ``base``; the lines of its evaluations."""
    data = str(tiny / "data")
    words = [data, "--tower", str(tiny / "tower"), "--validation", data, *SMALL, *more]
    assert run("train-tower", [*words, "--output", str(output)]) == 0
    return [line for line in lines(output) if "i2t_r1" in line]


def heads_lines(output: Path) -> list[dict]:
    return [line for line in lines(output) if line.get("event") == "heads"]


def test_a_run_has_its_before(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "run"
    output.mkdir()
    # by a run killed before its first checkpoint
    left = '{"step": 0, "i2t_r1": 0.5}\n{"step": 1, "loss": 1.0}\n'
    (output / "metrics.jsonl").write_text(left)
    before, after = train(
        tiny,
        output,
        "--heads.steps",
        "5",
        "--heads.batch-size",
        "16",
        "--max-steps",
        "2",
    )
    assert before["step"] == 0
    assert before["samples"] == 0
    assert after["step"] == 2
    assert before["i2t_r1"] != 0.5
    said = capsys.readouterr().out
    assert (
        f"before -> after: i2t_r1 {before['i2t_r1']:.3f} -> {after['i2t_r1']:.3f}, t2i_r1 "
        in said
    )
    fit = heads_lines(output)
    assert [line["heads_step"] for line in fit] == [1, 2, 3, 4, 5]
    assert fit[-1]["heads_samples"] == 80
    assert all(
        line["heads_loss"] == line["heads_loss_infonce"] and line["heads_lr"] == 1e-3
        for line in fit
    )
    record = RunRecord.read(output / "run.json")
    card = TowerCard.read(output / "tower" / TowerCard.FILE)
    assert (
        record.before["t2i_r5"] == card.training["before"]["t2i_r5"] == before["t2i_r5"]
    )
    assert card.training["recipe"] == "base"
    assert card.training["data_samples"] == record.epoch_samples > 0
    row = f"| t2i_r5 | {before['t2i_r5']:.4f} | {after['t2i_r5']:.4f} |"
    assert row in (output / "tower" / "README.md").read_text()
    resumed = ("--max-steps", "3", "--allow-changed", "train.max_steps")
    again, _, longer = train(
        tiny, output, "--heads.steps", "5", "--heads.batch-size", "16", *resumed
    )
    assert again == before
    assert longer["step"] == 3
    assert heads_lines(output) == fit
    assert RunRecord.read(output / "run.json").before == record.before


def test_remote_data_is_read_in_the_windows_that_are_recorded(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    windows = []
    make = tower.make_batches

    def noting(data, *more):
        windows.extend(
            [
                data.config.read.shuffle_window,
                *make(data, *more).dataset.mixture().windows,
            ]
        )
        return make(data, *more)

    monkeypatch.setattr(remote, "is_network", lambda path: True)
    monkeypatch.setattr(tower, "make_batches", noting)
    train(tiny, tiny / "remote", "--heads.steps", "0", "--max-steps", "1")
    assert windows[0] == windows[1] > remote.NETWORK_WINDOW


def test_random_heads_have_no_before_and_scoring_changes_nothing(
    tiny: Path, tmp_path: Path
):
    words = (
        "--tower.keep-heads",
        "--tower",
        str(tiny / "run" / "tower"),
        "--heads.steps",
        "0",
        "--max-steps",
        "2",
    )
    (after,) = train(tiny, tiny / "run", "--heads.steps", "0", "--max-steps", "2")
    assert after["step"] == 2
    assert heads_lines(tiny / "run") == []
    before, _ = train(tiny, tmp_path / "with", *words)
    train(tiny, tmp_path / "without", *words, "--no-eval-on-start")
    assert before["step"] == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_lift_trains_a_tower_from_random_weights(tmp_path: Path):
    """Its recipe: the tower learns from the cache, in a few steps."""
    steps = 12
    tiny = make_all(tmp_path)
    output = tmp_path / "run"
    words = [
        str(tiny / "data"),
        "--recipe",
        "lift_b16",
        "--tower.architecture",
        str(tiny / "tower"),
        "--seed",
        "3",
    ]
    words += [
        "--validation",
        str(tiny / "data"),
        "--output",
        str(output),
        "--precision",
        "fp32",
        "--workers",
        "0",
    ]
    words += [
        "--global-batch",
        "16",
        "--max-steps",
        str(steps),
        "--lr",
        "1e-2",
        "--warmup-steps",
        "2",
    ]
    assert run("train-tower", words) == 0
    values = losses(output)
    assert sorted(values) == list(range(1, steps + 1))
    assert values[steps] < 0.9 * values[1]
    (scores,) = (line for line in lines(output) if "i2t_r1" in line)
    assert scores["step"] == steps  # a random tower has no before
    assert (
        TowerCard.read(output / "tower" / TowerCard.FILE).training["recipe"]
        == "lift_b16"
    )
    dual, _ = load_dual(output / "tower")
    captions = torch.randn(2, WIDTH)
    fixed = torch.nn.functional.normalize(captions, dim=-1)
    assert torch.allclose(dual.encode_text(captions), fixed, atol=1e-6)
