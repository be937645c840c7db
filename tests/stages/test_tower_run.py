"""Whole runs of the command: under the launcher, killed and started again, stopped, non-finite, on
a full disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked import Script
from forked_python import programs
from small_disk import mounted
from tower_runs import (
    ROOT,
    STEPS,
    environment,
    finish,
    killed_at,
    lines,
    losses,
    options,
    ranks_of,
    start,
    wait_for,
)

from llm2clip_plugin import load_dual_encoder, load_tower
from llm2clip_plugin.contracts import RunRecord, TowerCard
from llm2clip_plugin.errors import StoppedError
from llm2clip_plugin.stages.tower import train_tower
from llm2clip_plugin.stages.tower_config import TRAIN_TOWER
from llm2clip_plugin.train.checkpoint import load
from llm2clip_plugin.train.distributed import free_port


@pytest.mark.slow
def test_killed_again_and_again_it_has_the_same_losses(tiny: Path, tmp_path: Path):
    """SIGKILL on both ranks: before a checkpoint, when one was just written, in another epoch; one
    rank ends it."""
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    zero = ["--deepspeed", "scripts/zero1.json"]
    assert finish(start(options(tiny, straight, *zero), 2)) == [0, 0]
    expected = losses(straight)
    assert sorted(expected) == list(range(1, STEPS + 1))
    for step in (2, 5, 12):
        killed_at(options(tiny, killed, *zero), killed, step, saved=step > 2)
    assert finish(start(options(tiny, killed, *zero), 1)) == [0]
    assert losses(killed) == pytest.approx(expected, abs=1e-5)
    expected_state = load_dual_encoder(straight / "tower").state_dict()
    state = load_dual_encoder(killed / "tower").state_dict()
    torch.testing.assert_close(state, expected_state, atol=2e-4, rtol=1e-3)
    assert (killed / "tower-ema" / TowerCard.FILE).is_file()


def launched(folder: Path, tiny: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    """`deepspeed --num_gpus 2` of ``folder``, in the middle of 2,000 steps without a checkpoint."""
    command = [
        str(folder / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [
        "scripts/train_tower.py",
        *options(tiny, run, *more, "--max_steps", "2000", "--save_steps", "0"),
    ]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, **streams
    )
    wait_for(lambda: losses(run) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    return process


@pytest.mark.slow
def test_the_launcher_stops_cleanly_and_resumes(tiny: Path, tmp_path: Path):
    """ZeRO-3 and loader processes: SIGTERM saves; two ranks resume and export."""
    run = tmp_path / "run"
    more = [
        "--report_to",
        "csv",
        "--data.validation",
        str(tiny / "data"),
        "--deepspeed",
        "scripts/zero3.json",
    ]
    more += [
        "--dataloader_num_workers",
        "1",
        "--evaluation.workers",
        "1",
        "--train.micro-batch",
        "4",
    ]
    process = launched(programs(), tiny, run, *more)
    ranks = ranks_of(run)
    assert len(ranks) == 2
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == StoppedError.status
    stopped = RunRecord.read(run / RunRecord.FILE)
    assert "SIGTERM: saved step" in errors
    assert not stopped.finished
    assert 0 < stopped.step < 2000
    assert not (run / "tower").exists()
    end = stopped.step + 2
    again = options(
        tiny, run, *more, "--max_steps", str(end), "--allow-changed", "train.max_steps"
    )
    assert finish(start(again, 2)) == [0, 0]
    ended = RunRecord.read(run / RunRecord.FILE)
    assert ended.finished
    assert ended.step == end
    assert ended.samples == 16 * end
    assert sorted(losses(run)) == list(range(1, end + 1))
    before, scores = [line for line in lines(run) if "i2t_r1" in line]
    assert before["step"] == before["samples"] == 0
    assert "t2i_r10" in scores
    assert scores["step"] == end
    assert load_tower(run / "tower").config.image_size == 16
    card = TowerCard.read(run / "tower" / TowerCard.FILE)
    assert card.training["steps"] == end
    assert card.metrics["i2t_r1"] == scores["i2t_r1"]
    assert list((run / "monitor").rglob("*loss*.csv"))


@pytest.mark.slow
def test_ranks_stop_when_their_launcher_ends(tiny: Path, tmp_path: Path):
    """A SIGTERM to `deepspeed` ends it alone; the ranks notice, save and go."""
    run = tmp_path / "run"
    process = launched(Path(sys.executable).parent, tiny, run)
    ranks = [psutil.Process(pid) for pid in ranks_of(run)]
    assert len(ranks) == 2
    process.terminate()
    assert process.wait(timeout=60) != 0
    assert psutil.wait_procs(ranks, timeout=120)[1] == []
    stopped = RunRecord.read(run / RunRecord.FILE)
    assert not stopped.finished
    assert 0 < stopped.step < 2000
    assert (run / "checkpoints" / f"step-{stopped.step:08d}").is_dir()


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A short run, one whose weights overflow, and one whose checkpoints are lost; in one
    process."""
    folder = tmp_path_factory.mktemp("runs")
    forward = options(tiny, folder / "lost", "--max_steps", "4")
    commands = {
        "good": options(tiny, folder / "run", "--max_steps", "2"),
        "before": options(tiny, folder / "nan", "--max_steps", "2"),
        "non-finite": options(
            tiny,
            folder / "nan",
            "--max_steps",
            "4",
            "--allow-changed",
            "train.max_steps",
        ),
        "forward": forward,
        "lost checkpoints": forward,
    }
    script = folder / "script.py"
    script.write_text(SCRIPT)
    process = Script(
        script,
        [json.dumps(commands), str(folder / "results.json")],
        environment(),
        ROOT,
    )
    assert process.wait(timeout=900) == 0, process.output
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


SCRIPT = """
import contextlib, io, json, shutil, sys
from pathlib import Path
from llm2clip_plugin.cli import run
from llm2clip_plugin.train.checkpoint import AVERAGES, MODEL, OPTIMIZER, load, write_checkpoint

commands, out, results = json.loads(sys.argv[1]), sys.argv[2], {}
for name, argv in commands.items():
    told = io.StringIO()
    if name == "non-finite":
        path = next((Path(out).parent / "nan" / "checkpoints").glob("step-*"))
        loaded = load(path)
        weights = dict(loaded.weights)
        weights["visual_projection.weight"][:] = 3e38  # finite, but no product with it is
        tensors = {MODEL: weights, OPTIMIZER: dict(loaded.moments), AVERAGES: dict(loaded.averages)}
        write_checkpoint(path, loaded.state, tensors)
    if name == "lost checkpoints":
        shutil.rmtree(Path(out).parent / "lost/checkpoints")
    with contextlib.redirect_stderr(told):
        status = run("train-tower", argv)
    results[name] = {"status": status, "error": told.getvalue()}
Path(out).write_text(json.dumps(results))
"""


def test_the_runs_average_follows_its_weights(runs: dict[str, Any], tiny: Path):
    """After two updates the start has a share of 2/11 x 3/12, the last weights one of 9/12."""
    (path,) = (runs["folder"] / "run" / "checkpoints").glob("step-*")
    loaded = load(path)
    start = {
        f"tower.{name}": value
        for name, value in load_tower(tiny / "tower").state_dict().items()
    }
    matrices = [
        name for name in loaded.averages if name in start and start[name].ndim > 1
    ]
    assert len(matrices) > 5
    for name in matrices:
        weight = loaded.weights[name].float()
        average = loaded.averages[name]
        moved = (weight - start[name]).norm()
        assert moved > 0, name
        assert (average - weight).norm() < 0.6 * moved, name


CACHED = ("--train.micro-batch", "4", "--gradient-checkpointing", "True")
REFERENCE = ("--loss.terms", "infonce=1", "patch_reference=0.5")


@pytest.mark.parametrize(
    "more, most",
    [(CACHED, 3), (REFERENCE, 6)],
    ids=["cached", "with a frozen reference"],
)
def test_compiled_it_has_the_same_losses(
    tiny: Path, tmp_path: Path, graphs: list[int], more: Any, most: int
):
    """All blocks share a graph for each kind of pass; none comes after the first step.
    transformers' hooks, which read hidden states for the reference, cut a block in three."""
    for compiled in ("False", "True"):
        argv = options(
            tiny,
            tmp_path / compiled,
            "--torch_compile",
            compiled,
            "--heads.steps",
            "0",
            *more,
        )
        train_tower(TRAIN_TOWER.parse([*argv, "--max_steps", "3"]))
    assert losses(tmp_path / "True") == pytest.approx(
        losses(tmp_path / "False"), abs=1e-5
    )
    assert graphs[:3] == [0, 0, 0]
    assert 0 < graphs[3] == graphs[5] <= most


COMPILED = """
import sys, torch
from llm2clip_plugin.cli import leave, run
torch._logging.set_logs(graph_code=True)
leave(run("train-tower", sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile builds C++ on a CPU"
)
def test_inductor_gives_the_same_losses(
    tiny: Path, runs: dict[str, Any], tmp_path: Path
):
    argv = options(
        tiny, tmp_path / "run", "--max_steps", "2", "--torch_compile", "True"
    )
    (tmp_path / "compiled.py").write_text(COMPILED)
    process = Script(tmp_path / "compiled.py", argv, environment(), ROOT)
    assert process.wait(timeout=900) == 0, process.output[-3000:]
    assert "TRACED GRAPH" in process.output, process.output[-3000:]
    assert losses(tmp_path / "run") == pytest.approx(
        losses(runs["folder"] / "run"), abs=1e-5
    )


def test_lost_checkpoints_are_an_error(runs: dict[str, Any]):
    lost = runs["lost checkpoints"]
    assert runs["forward"]["status"] == 0
    assert lost["status"] == 2
    assert "step 4" in lost["error"]
    assert not (runs["folder"] / "lost/run.lock").exists()


def test_a_non_finite_loss_stops_and_the_last_checkpoint_stays(runs: dict[str, Any]):
    result = runs["non-finite"]
    run = runs["folder"] / "nan"
    assert runs["before"]["status"] == 0
    assert result["status"] == 3
    assert "error: the loss is not finite" in result["error"]
    assert "16 samples have non-finite features" in result["error"]
    # the samples' keys
    assert re.search(r"rank 0: [01]-0\d\d, [01]-0\d\d", result["error"])
    assert "Traceback" not in result["error"]
    stopped = lines(run)[-1]
    assert (stopped["step"], stopped["event"]) == (2, "failed")
    assert stopped["reason"] in result["error"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert not RunRecord.read(run / RunRecord.FILE).finished


def test_a_full_disk_is_one_error(tiny: Path, tmp_path: Path):
    """Two ranks into 96 kB: no checkpoint fits."""
    disk = tmp_path / "disk"
    more = ("--heads.steps", "0", "--deepspeed", "scripts/zero1.json")
    with mounted(disk, "96k"):
        ranks = start(options(tiny, disk / "run", *more), 2)
        statuses = finish(ranks)
    output = "".join(rank.output for rank in ranks)
    assert statuses == [2, 2], output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output, output
    assert "trying again" in output, output
    assert f"cannot write {disk / 'run/checkpoints'}/step-{STEPS:08d}" in output, output
