"""What v0.1 wrote is opened, resumed, measured and exported as v0.1 did: tests/fixtures/v0_1, through the commands."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command
from safetensors.torch import load_file
from tower_runs import environment, finish

FIXTURES = Path(__file__).parents[1] / "fixtures"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(FIXTURES))

from make_v0_1 import TAR_TIME, features, losses, replace_in_texts  # noqa: E402

from llm2clip_plugin.cli import main  # noqa: E402

EXPECTED: dict[str, Any] = json.loads((FIXTURES / "v0_1" / "expected.json").read_text())
TENSORS = load_file(FIXTURES / "v0_1" / "expected.safetensors")
FORWARD = 2e-5  # fp32 sums of another CPU, as for the golden features
TRAINED = 2e-4  # the same through a few steps of AdamW


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures, which is the working directory: the commands of v0.1 had relative paths."""
    folder = tmp_path / "v0_1"
    shutil.copytree(FIXTURES / "v0_1", folder, ignore=shutil.ignore_patterns("llava"))
    replace_in_texts(folder, "@ROOT@", str(folder))
    for tar in (folder / "data" / "tars").glob("*.tar"):
        os.utime(tar, (TAR_TIME, TAR_TIME))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLM2CLIP_HOME", str(folder / "home"))
    monkeypatch.delenv("LLM2CLIP_TOWER", raising=False)
    return folder


def hold(folder: Path, name: str, *, atol: float) -> None:
    """A tower directory gives the features that v0.1 recorded under ``name``."""
    measured = features(folder)
    for key, value in measured.items():
        torch.testing.assert_close(value, TENSORS[f"{name}.{key}"], atol=atol, rtol=10 * atol, msg=f"{name}: {key}")


def resume(run: str, *, world: int = 1) -> None:
    """Run the command of a stopped run again, on ``world`` ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in map(str, range(world)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        variables = environment(**(place | {"MASTER_PORT": port} if world > 1 else {}))
        ranks.append(Command(EXPECTED["commands"][run], variables, Path.cwd()))
    assert finish(ranks) == [0] * world, ranks[0].output[-3000:]


def check_resumed(run: str) -> None:
    """The run ended with the losses of one that v0.1 never stopped, and did not repeat the steps before its stop."""
    expected = {int(step): loss for step, loss in EXPECTED["losses"][run].items()}
    assert sorted(losses(Path(run))) == sorted(expected)
    assert losses(Path(run)) == pytest.approx(expected, abs=1e-4)
    kept = [json.loads(line) for line in (FIXTURES / "v0_1" / run / "metrics.jsonl").read_text().splitlines()]
    checkpoint = json.loads(next((FIXTURES / "v0_1" / run / "checkpoints").glob("*/state.json")).read_text())["step"]
    now = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert now[:checkpoint] == kept[:checkpoint]  # its times too: these lines are v0.1's
    record = json.loads(Path(run, "run.json").read_text())
    assert record["finished"] and record["step"] == max(expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "eva02", "imported"])
def test_towers(world: Path, name: str) -> None:
    """Features by load_tower and load_dual_encoder; an export is the same weights by the same hash."""
    hold(world / "towers" / name, name, atol=FORWARD)
    assert main(["export", f"towers/{name}", "--output", "again"]) == 0
    card = json.loads(Path("again/llm2clip.json").read_text())
    before = json.loads(Path(f"towers/{name}/llm2clip.json").read_text())
    assert card["weights_sha256"] == before["weights_sha256"] == EXPECTED["weights_sha256"][name]
    assert card["adapter_sha256"] == before["adapter_sha256"]
    moved = {"llm": "../llm"} if before["teacher"] else {}  # a path, now relative to the tower
    assert card["teacher"] == before["teacher"] | moved
    hold(Path("again"), name, atol=FORWARD)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_evaluate_on_cached_tars(world: Path, name: str) -> None:
    """The recall that v0.1 measured, with its cache and its indexes, which are read and not written again."""
    indexes = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("data/tars").glob(".*.index")}
    assert len(indexes) == 2
    words = ("--data.path", "data/tars", "--cache", "data/cache-float16", "--resamples", "200", "--json", "now.json")
    assert main(["evaluate", f"towers/{name}", *words]) == 0
    now, before = (json.loads(Path(p).read_text()) for p in ("now.json", f"scores/retrieval/{name}.scores.json"))
    assert now["metrics"] == pytest.approx(EXPECTED["evaluate"][name])
    assert before["metrics"] == EXPECTED["evaluate"][name]
    assert now["items"] == before["items"]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in indexes} == indexes


def test_evaluate_on_cached_rows(world: Path) -> None:
    words = ("--data.path", "data/rows/pairs.jsonl", "--cache", "data/cache-rows", "--json", "now.json")
    assert main(["evaluate", "towers/clip", *words, "--resamples", "0"]) == 0
    assert json.loads(Path("now.json").read_text())["metrics"] == pytest.approx(EXPECTED["evaluate"]["rows"])


@pytest.mark.parametrize(
    ("data", "cache", "dtype"),
    [
        ("data/tars", "data/cache-float16", "float16"),
        ("data/tars", "data/cache-int8", "int8"),
        ("data/rows/pairs.jsonl", "data/cache-rows", "float16"),
    ],
)
def test_caches(world: Path, data: str, cache: str, dtype: str) -> None:
    """--verify embeds again with the fixture's LLM and adapter: the teacher's fingerprint and the rows are v0.1's.

    Embedding once more finds the cache complete and leaves it as it is.
    """
    words = [data, "--cache", cache, "--dtype", dtype, "--llm", "llm", "--adapter", "adapter"]
    words += ["--compute-dtype", "float32"]
    assert main(["embed", *words, "--verify"]) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(cache).glob("*.safetensors")}
    assert main(["embed", *words]) == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def test_stage_2_resumes(world: Path) -> None:
    """One rank, moving average, validation; stopped by SIGTERM."""
    assert main(["export", "training/tower", "--output", "stopped"]) == 0
    hold(Path("stopped"), "stopped-tower", atol=FORWARD)
    assert main(["export", "training/tower", "--ema", "--output", "stopped-ema"]) == 0
    hold(Path("stopped-ema"), "stopped-tower-ema", atol=FORWARD)
    resume("training/tower")
    check_resumed("training/tower")
    hold(Path("training/tower/tower"), "tower", atol=TRAINED)
    hold(Path("training/tower/tower-ema"), "tower-ema", atol=TRAINED)
    card = json.loads(Path("training/tower/tower/llm2clip.json").read_text())
    assert card["metrics"] == pytest.approx(EXPECTED["metrics"]["training/tower"])


def test_stage_2_resumes_on_two_ranks(world: Path) -> None:
    """ZeRO-2, gradient caching, an int8 cache; killed by SIGKILL a step after its checkpoint."""
    assert main(["export", "training/tower-zero2", "--output", "stopped"]) == 0
    hold(Path("stopped"), "stopped-tower-zero2", atol=FORWARD)
    resume("training/tower-zero2", world=2)
    check_resumed("training/tower-zero2")
    hold(Path("training/tower-zero2/tower"), "tower-zero2", atol=TRAINED)


def test_stage_1_resumes(world: Path) -> None:
    """The adapter at its end is the one that v0.1 wrote, and its card names the same LLM and settings."""
    resume("training/llm")
    check_resumed("training/llm")
    now, before = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("training/llm/adapter", "adapter"))
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(now[name], tensor, atol=TRAINED, rtol=10 * TRAINED, msg=name)
    cards = [json.loads(Path(f, "llm2clip_encoder.json").read_text()) for f in ("training/llm/adapter", "adapter")]
    for card in cards:
        card.pop("training")
        card.pop("adapter_sha256", None)
        card["versions"].pop("record_sha256", None)  # version 0.1 wrote none
    assert cards[0] == cards[1]


def test_a_changed_setting_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings that v0.1 recorded are compared with today's, field by field."""
    assert main([*EXPECTED["commands"]["training/tower"], "--optim.lr", "1e-3"]) == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert "optim.lr" in error and "0.0004" in error and "0.001" in error
    assert "dual" not in error and "data" not in error  # a renamed field would be reported as changed


@pytest.mark.parametrize(
    ("name", "sides", "keys"),
    [
        ("mllm", ("model-a", "model-b"), ("low", "high", "p", "p_holm", "p_mcnemar", "standard_error")),
        ("retrieval", ("retrieval/clip.scores.json", "retrieval/siglip.scores.json"), ("p", "p_holm")),
    ],
)
def test_compare(world: Path, name: str, sides: tuple[str, str], keys: tuple[str, ...]) -> None:
    """The same scores, differences, wins and p from v0.1's score files."""
    words = [f"scores/{side}" for side in sides]
    assert main(["compare", *words, "--json", "now.json", "--no-images", "--resamples", "1000"]) == 0
    rows = json.loads(Path("now.json").read_text())["rows"]
    assert len(rows) == len(EXPECTED[f"compare-{name}"])
    for now, before in zip(rows, EXPECTED[f"compare-{name}"], strict=True):
        for key in ("benchmark", "title", "unit", "questions", "wins", "losses", "ties", "runs"):
            assert now[key] == before[key], key
        for key in ("base", "new", "difference", *keys):
            assert now[key] == pytest.approx(before[key], abs=1e-9), key


def test_known_towers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """towers.json: both names, the chosen one, and what lies there."""
    assert main(["towers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row, before in zip(rows, EXPECTED["towers"], strict=True):
        assert (row["name"], row["chosen"]) == (before["name"], before["chosen"])
        assert row["weights_sha256"] == before["weights_sha256"] == row["card"]["weights_sha256"]
        assert row["spec"] == before["spec"].replace("@ROOT@", str(world))
        assert row["card"] == before["card"]  # with its keys
    assert main(["use", "my-dinov2"]) == 0
    assert json.loads(Path("home/towers.json").read_text())["chosen"] == "my-dinov2"
