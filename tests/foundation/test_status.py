"""llm2clip status: a run that is running, finished, stopped, failed, killed."""

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path
from unittest import mock

import psutil
import pytest
from tiny_data import make_cache, make_shards

from llm2clip_plugin.cli import run
from llm2clip_plugin.contracts import RunRecord
from llm2clip_plugin.status import cache_rows, run_rows


def words(tiny: Path, output: Path) -> list[str]:
    data = str(tiny / "data")
    return [
        *(
            data,
            "--tower",
            str(tiny / "tower"),
            "--validation",
            data,
            "--precision",
            "fp32",
            "--global-batch",
            "16",
        ),
        *(
            "--workers",
            "0",
            "--heads.steps",
            "2",
            "--max-steps",
            "4",
            "--save-steps",
            "2",
            "--output",
            str(output),
        ),
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
    record = dataclasses.replace(
        RunRecord.read(copy / "run.json"), finished=False, step=0, metrics={}
    )
    record.write(copy / "run.json")
    kept = [
        line
        for line in (copy / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] <= 2
    ]
    (copy / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    return copy


def add(folder: Path, **line: object) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def rows(folder: Path) -> dict[str, str]:
    """What is shown of a run, its state under "state"."""
    (_, state), *others = run_rows(folder)
    return {"state": state, **dict(others)}


def test_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]):
    row_of = rows(finished)
    record = RunRecord.read(finished / "run.json")
    assert row_of["state"] == "finished"
    assert not {"problem", "go on"} & set(row_of)
    assert row_of["progress"].startswith(
        "step 4 of 4 (100 %), 64 samples, 1.33 epochs, loss "
    )
    assert row_of["checkpoints"] == "step-00000002, step-00000004"
    assert row_of["result"] == str(finished / "tower")
    for name in ("i2t_r1", "t2i_r1"):
        before, best, last = row_of[name].split(", ")
        assert before == f"before {record.before[name]:.3f}"
        assert last == f"last {record.metrics[name]:.3f} (step 4)"
        assert float(best.split()[1]) >= float(last.split()[1])
    assert run("status", [str(finished)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{finished}: finished"
    assert said[1].split()[:3] == ["progress", "step", "4"]


def test_one_that_was_killed_says_how_to_go_on_and_that_works(tiny: Path, folder: Path):
    row_of = rows(folder)
    assert row_of["state"].startswith("ended early: no message")
    assert "left at the last rate" in row_of["progress"]
    assert row_of["checkpoints"] == "step-00000002"
    assert row_of["result"].startswith("none yet")
    assert row_of["go on"].startswith(f"llm2clip train-tower {tiny}/data --tower ")
    assert "--max-steps 4" in row_of["go on"]
    go_on = row_of["go on"].split()[2:]
    go_on[go_on.index("--output") + 1] = str(folder)  # the fixture's copy
    assert run("train-tower", go_on) == 0
    assert rows(folder)["state"] == "finished"


def test_why_it_ended(folder: Path):
    add(folder, step=2, event="stopped", reason="SIGTERM", time="2026-11-26 10:00:00")
    assert rows(folder)["state"] == "stopped: SIGTERM, 2026-11-26 10:00:00"
    # it went on, and was killed
    add(folder, step=3, samples=48, loss=1.0, step_seconds=2.0)
    assert rows(folder)["state"].startswith("ended early")
    assert rows(folder)["progress"].startswith("step 3 ")
    add(folder, step=3, event="checkpoint failed", reason="No space left on device")
    add(
        folder,
        step=3,
        event="failed",
        reason="the loss is nan",
        time="2026-11-26 11:00:00",
    )
    row_of = rows(folder)
    assert row_of["state"].startswith("failed: the loss is nan")
    assert (
        row_of["problem"]
        == "the last checkpoint could not be written: No space left on device"
    )


def test_the_best_score_and_the_time_left(folder: Path):
    record = RunRecord.read(folder / "run.json")
    dataclasses.replace(record, total_steps=100).write(folder / "run.json")
    kept = [
        line
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] == 0
    ]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))
    for step in range(1, 91):
        add(folder, step=step, samples=16 * step, loss=1.0, step_seconds=2.0)
    for step, recall in ((30, 0.25), (60, 0.75), (90, 0.5)):
        add(folder, step=step, samples=16 * step, i2t_r1=recall, t2i_r1=recall)
    row_of = rows(folder)
    assert "step 90 of 100 (90 %)" in row_of["progress"]
    assert "0:00:20 left at the last rate" in row_of["progress"]
    assert row_of["i2t_r1"].endswith("best 0.750 (step 60), last 0.500 (step 90)")


def test_a_cache_is_complete_with_all_files_of_its_shards(tmp_path: Path):
    folder = make_cache(make_shards(tmp_path))
    (_, state), *others = cache_rows(folder)
    assert state.startswith("complete: 2 of 2 shards")
    assert "problem" not in dict(others)
    (folder / "00001.safetensors").unlink()
    (_, state), *others = cache_rows(folder)
    assert state.startswith("not complete: 1 of 2 shards")
    assert (
        dict(others)["problem"]
        == "1 shards of the manifest have no file, such as 00001"
    )


def test_running_here_and_elsewhere(folder: Path):
    me = psutil.Process()
    lock = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": me.create_time(),
    }
    (folder / "run.lock").write_text(json.dumps(lock))
    row_of = rows(folder)
    assert row_of["state"].startswith(f"running: process {os.getpid()}")
    assert "go on" not in row_of
    # its number was given to another process
    (folder / "run.lock").write_text(json.dumps(lock | {"started": 1.0}))
    assert rows(folder)["state"].startswith("ended early")
    (folder / "run.lock").write_text(json.dumps(lock | {"host": "node-7"}))
    assert rows(folder)["state"].startswith("running on another host: ")
    assert "node-7, or killed" in rows(folder)["state"]


def test_the_loader_processes_that_the_steps_need(tiny: Path, folder: Path):
    assert "images/s" in rows(folder)["loader"]  # of a real run
    for step in range(
        3, 43
    ):  # 150 images/s, half of the time waiting for data: 300 without
        values = {
            "samples_per_second": 150,
            "wait_share": 0.5,
            "loader_images_per_second": 110,
        }
        add(folder, step=step, samples=16 * step, loss=1.0, **values)
    assert "110.0 images/s" in (loader := rows(folder)["loader"])
    assert "300.0: they need 3 loader processes (--workers times ranks)" in loader


def test_restarts_are_one_run_of_wandb(tiny: Path, tmp_path: Path):
    base = words(tiny, tmp_path / "run")
    more = ("--report_to", "wandb", "--no-eval-on-start", "--max-steps")
    with mock.patch.dict(
        os.environ, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true"
    ):
        wandb = pytest.importorskip("wandb")
        for steps in ("2", "4"):
            assert (
                run(
                    "train-tower",
                    [*base, *more, steps, "--allow-changed", "train.max_steps"],
                )
                == 0
            )
            assert wandb.run.config["train"]["max_steps"] == int(steps)
            wandb.teardown()  # as the end of the process; it has read the environment
    saved = RunRecord.read(tmp_path / "run/run.json").wandb
    assert [
        path.name.endswith(saved) for path in (tmp_path / "wandb").glob("offline-run-*")
    ] == [
        True,
        True,
    ]
