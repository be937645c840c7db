"""Ranks, ZeRO stages, micro-batches change nothing: the command on tiny CLIP and DINOv2 towers, under the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_data import make_all
from torch import Tensor
from tower_runs import finish, losses, options, start

from llm2clip_plugin.train.distributed import set_single_process_environment

TOWERS = ("clip", "dinov2")
STEPS = 6
BETA1 = 0.9  # of AdamW, whose first moment after one step is (1 - BETA1) x gradient

SCRIPT = """
import json, sys
from pathlib import Path
from llm2clip_plugin.cli import leave, run

for argv in json.loads(Path(sys.argv[-1]).read_text()):
    if status := run("train-tower", argv):
        break
leave(status)
"""


def commands(folder: Path, name: str) -> dict[str, list[str]]:
    """Command lines by the name of their run: losses under each ZeRO stage, and one step each for the gradients."""
    tower = folder / name
    one_batch = ("--max_steps", "1", "--train.global-batch", "32", "--optim.max-grad-norm", "1e9")
    one_batch = (*one_batch, "--optim.betas", str(BETA1), "0.98", "--heads.steps", "0")
    found = {
        f"zero{stage}": ("--max_steps", str(STEPS), "--deepspeed", f"scripts/zero{stage}.json") for stage in range(4)
    }
    found |= {"whole": one_batch, "cached": (*one_batch, "--train.micro-batch", "4")}
    return {
        run: options(tower, folder / "WORLD" / name / run, "--save_steps", "0", *more) for run, more in found.items()
    }


def run(folder: Path, world: int, argvs: list[list[str]]) -> None:
    """Run the commands one after another on ``world`` ranks."""
    todo = folder / f"{world}.json"
    todo.write_text(json.dumps([[word.replace("WORLD", str(world)) for word in argv] for argv in argvs]))
    script = folder / "script.py"
    script.write_text(SCRIPT)
    ranks = start([str(todo)], world, script)
    assert finish(ranks) == [0] * world, ranks[0].output[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WORLD/TOWER/RUN: every run of two ranks, and of one rank those that the others must equal."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {name: commands(folder, name) for name in TOWERS}
    for name in TOWERS:
        make_all(folder / name, name)
    run(folder, 1, [found[name][run] for name in TOWERS for run in ("zero0", "whole", "cached")])
    run(folder, 2, [argv for name in TOWERS for argv in found[name].values()])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", TOWERS)
def test_losses_of_two_ranks_are_those_of_one(runs: Path, name: str, stage: int):
    """fp32 sums in another order: 1e-5."""
    expected = losses(runs / "1" / name / "zero0")
    assert sorted(expected) == list(range(1, STEPS + 1)) and max(expected.values()) - min(expected.values()) > 0.1
    assert losses(runs / "2" / name / f"zero{stage}") == pytest.approx(expected, abs=1e-5)


def gradients(run: Path) -> dict[str, Tensor]:
    """Of the first step, before clipping: what AdamW's first moment holds after it."""
    moments = load_file(run / "checkpoints/step-00000001/optimizer.safetensors")
    return {name: value / (1 - BETA1) for name, value in moments.items() if name.endswith(".exp_avg")}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["1/{}/cached", "2/{}/cached", "2/{}/whole"])
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_of_cut_batches_are_those_of_one_batch(runs: Path, name: str, run: str):
    """8 micro-batches of 4 on one rank, 4 of 4 on each of two, and 16 on each, against one batch of 32."""
    whole, cut = gradients(runs / "1" / name / "whole"), gradients(runs / run.format(name))
    assert whole.keys() == cut.keys() and len(whole) > 30
    norm = torch.stack([value.norm() for value in whole.values()]).norm()
    for key, value in whole.items():
        # fp32 sums in another order; keys' biases have no gradient in exact arithmetic, so the bound is of the whole
        assert float((cut[key] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-7 * float(norm), key


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("SLURM_NTASKS", "16")  # of the whole job, also in the batch script
    set_single_process_environment()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "16")
    with pytest.raises(ValueError, match=variable):
        set_single_process_environment()
