"""llm2clip status: a run that is running, finished, stopped, failed, killed."""

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from llm2clip_plugin.cli import run
from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.status import run_status


def words(tiny: Path, output: Path) -> list[str]:
    data = str(tiny / "data")
    return [
        *(data, "--tower", str(tiny / "tower"), "--validation", data, "--precision", "fp32", "--global-batch", "16"),
        *("--workers", "0", "--heads.steps", "2", "--max-steps", "4", "--save-steps", "2", "--output", str(output)),
    ]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert run("train-tower", [*words(tiny, output), "--eval-steps", "2"]) == 0
    return output


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run as if it had ended after step 2, without a word."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "tower")
    shutil.rmtree(copy / "checkpoints/step-00000004")
    record = dataclasses.replace(RunRecord.read(copy / "run.json"), finished=False, step=0, metrics={})
    record.write(copy / "run.json")
    kept = [line for line in (copy / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 2]
    (copy / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    return copy


def add(folder: Path, **line: object) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    status = run_status(finished)
    assert (status.state, status.step, status.total_steps, status.samples) == ("finished", 4, 4, 64)
    assert status.epoch_samples == 48 and status.problems == [] and status.go_on == ""
    assert status.checkpoints == ["step-00000002", "step-00000004"] and status.results == ["tower"]
    record = RunRecord.read(finished / "run.json")
    assert status.before["i2t_r1"] == record.before["i2t_r1"] and status.last["i2t_r1"] == record.metrics["i2t_r1"]
    assert status.best["t2i_r1"][0] >= status.last["t2i_r1"] and status.last_scored == 4
    assert run("status", [str(finished)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{finished}: finished" and "go on" not in "".join(said)
    assert said[1].split()[:5] == ["progress", "step", "4", "of", "4"] and "1.33 epochs" in said[1]
    assert run("status", [str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4


def test_one_that_was_killed_says_how_to_go_on_and_that_works(tiny: Path, folder: Path):
    status = run_status(folder)
    assert (status.state, status.step) == ("killed", 2) and status.seconds_left is not None and status.seconds_left > 0
    assert status.checkpoints == ["step-00000002"] and status.results == []
    assert status.go_on.startswith(f"llm2clip train-tower {tiny}/data --tower ") and "--max-steps 4" in status.go_on
    go_on = status.go_on.split()[2:]
    go_on[go_on.index("--output") + 1] = str(folder)  # the fixture's copy
    assert run("train-tower", go_on) == 0
    assert run_status(folder).state == "finished"


def test_why_it_ended(folder: Path):
    add(folder, step=2, event="stopped", reason="SIGTERM", time="2026-11-26 10:00:00")
    assert run_status(folder).state == "stopped" and run_status(folder).reason == "SIGTERM, 2026-11-26 10:00:00"
    add(folder, step=3, samples=48, loss=1.0, step_seconds=2.0)  # it went on, and was killed
    assert run_status(folder).state == "killed" and run_status(folder).step == 3
    add(folder, step=3, event="checkpoint failed", reason="No space left on device")
    add(folder, step=3, event="failed", reason="the loss is nan", time="2026-11-26 11:00:00")
    status = run_status(folder)
    assert status.state == "failed" and status.reason.startswith("the loss is nan")
    assert status.problems == ["the last checkpoint could not be written: No space left on device"]


def test_running_here_and_elsewhere(folder: Path):
    me = psutil.Process()
    lock = {"host": socket.gethostname(), "pid": os.getpid(), "started": me.create_time()}
    (folder / "run.lock").write_text(json.dumps(lock))
    status = run_status(folder)
    assert status.state == "running" and f"process {os.getpid()}" in status.reason and status.go_on == ""
    (folder / "run.lock").write_text(json.dumps(lock | {"started": 1.0}))  # its number was given to another process
    assert run_status(folder).state == "killed"
    (folder / "run.lock").write_text(json.dumps(lock | {"host": "node-7"}))
    assert run_status(folder).state == "running elsewhere" and "node-7, or killed" in run_status(folder).reason
