"""The Slurm job comes back with progress alone, and never after an error that a rerun would meet
again."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from forked_python import programs
from safetensors.torch import load_file, save_file
from tiny_data import make_all
from tower_runs import ROOT, environment, options, wait_for

from llm2clip_plugin.run_folder import FINAL, PROGRESS
from llm2clip_plugin.train.distributed import free_port

JOB = ROOT / "scripts/slurm/torchrun.sbatch"


def submit(
    folder: Path, srun: str, *words: str, script: Path = JOB, **variables: str
) -> subprocess.Popen[str]:
    """The batch script in ``folder``, as Slurm starts it on a node; ``srun``: what its stand-in
    does."""
    stubs = folder / "bin"
    stubs.mkdir(exist_ok=True)
    (stubs / "srun").write_text(f"#!/bin/sh\n{srun}\n")
    (stubs / "scontrol").write_text(
        f'#!/bin/sh\necho localhost\necho "$@" >> {folder}/scontrol\n'
    )
    for program in stubs.iterdir():
        program.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "GPUS": "1",
    }
    slurm_variables = environment(
        **slurm,
        PATH=f"{stubs}:{os.environ['PATH']}",
        PYTHON=str(programs() / "python"),
        **variables,
    )
    log = (folder / "log").open("w")
    return subprocess.Popen(
        ["bash", str(script), *words],
        cwd=folder,
        env=slurm_variables,
        stdout=log,
        stderr=log,
        text=True,
    )


def requeued(folder: Path) -> bool:
    return "requeue 17" in (folder / "scontrol").read_text()


MADE = f"touch $LLM2CLIP_JOB_DIR/{PROGRESS}"
DETERMINISTIC = f"echo 3 > $LLM2CLIP_JOB_DIR/{FINAL}"


@pytest.mark.parametrize(
    ("srun", "comes_back", "status"),
    [
        ("exit 1", False, 1),
        (f"{MADE}; exit 1", True, 1),
        (f"{DETERMINISTIC}; exit 1", False, 3),
        (f"{MADE}; {DETERMINISTIC}; exit 1", False, 3),
        (f"{MADE}; exit 0", False, 0),
        (f"{DETERMINISTIC}; exit 0", False, 0),  # torchrun's restart succeeded
    ],
)
def test_a_failed_job_comes_back_with_progress_alone(
    tmp_path: Path, srun: str, comes_back: bool, status: int
):
    old = tmp_path / ".llm2clip-job-17"  # of the job's start before
    old.mkdir()
    (old / PROGRESS).touch()
    assert submit(tmp_path, srun).wait(timeout=60) == status
    assert requeued(tmp_path) is comes_back
    assert not old.exists()


@pytest.mark.parametrize(
    ("left", "comes_back", "status"), [(MADE, True, 75), ("true", False, 1)]
)
def test_a_job_at_its_limit_comes_back_with_progress_alone(
    tmp_path: Path, left: str, comes_back: bool, status: int
):
    stub = f"trap '{left}; exit 1' USR1; touch {tmp_path}/ready; while :; do sleep .1; done"
    job = submit(tmp_path, stub)
    wait_for((tmp_path / "ready").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == status
    assert requeued(tmp_path) is comes_back


@pytest.mark.slow
def test_bad_input_and_a_non_finite_loss_are_final_under_torchrun(tmp_path: Path):
    """Real ranks of the command: a setting that is out of bounds, a tower whose weights
    overflow."""
    tiny = make_all(tmp_path)
    weights = load_file(tiny / "tower/model.safetensors")
    next(value for name, value in weights.items() if "patch_embedding" in name)[:] = (
        3e38
    )
    save_file(weights, tiny / "tower/model.safetensors", metadata={"format": "pt"})
    job = tmp_path / "job"
    job.write_text(
        JOB.read_text().replace("$((20000 + SLURM_JOB_ID % 20000))", str(free_port()))
    )
    for more, status in ((("--lr", "11"), 2), ((), 3)):
        words = options(
            tiny,
            tmp_path / "run",
            "--heads.steps",
            "0",
            "--train.eval-on-start",
            "False",
            *more,
        )
        words = [str(ROOT / "scripts/train_tower.py"), *words]
        process = submit(tmp_path, 'exec "$@"', *words, script=job, MAX_RESTARTS="0")
        assert process.wait(timeout=600) == status, (tmp_path / "log").read_text()
        assert not requeued(tmp_path)
