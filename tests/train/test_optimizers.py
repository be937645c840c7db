"""A file in the folder is an optimizer; 8-bit AdamW under the launcher, killed and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import Process
from tiny_data import make_all
from tower_runs import STEPS, finish, losses, options, start
from train_helpers import run_ranks

from llm2clip_plugin.train import optimizers
from llm2clip_plugin.train.optim import Trained, parameter_groups
from llm2clip_plugin.train.optimizers.adamw import AdamW

KEEP_ALL = ("--save_total_limit", "0")
ADAMAX = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from llm2clip_plugin.train.optimizers.base import OptimizerSpec


@dataclass(frozen=True, kw_only=True)
class Adamax(OptimizerSpec):
    """Adam with the infinity norm (Kingma & Ba 2015, arXiv 1412.6980, algorithm 2)."""

    name: ClassVar[str] = "adamax"
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_inf")

    def make(self, groups, *, lr, betas, eps):
        return torch.optim.Adamax(groups, lr=lr, betas=betas, eps=eps)

    def empty_state(self, optimizer, master, updates):
        return {"step": torch.tensor(float(updates)), **{m: torch.zeros_like(master.data) for m in self.moments}}


OPTIMIZER = Adamax
'''


def test_adamw_is_the_formula_with_each_groups_rate_and_decay():
    """Loshchilov & Hutter 2019, algorithm 2, for a matrix with decay and a vector without, at different rates."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(3))
    trained = [
        Trained(name="matrix", parameter=matrix, lr=0.1, decay=True),
        Trained(name="vector", parameter=vector, lr=0.3, decay=False),
    ]
    adamw = AdamW().make(parameter_groups(trained, 0.2), lr=9.0, betas=(0.8, 0.95), eps=1e-6)
    expected = [(matrix.detach().clone(), 0.1, 0.2), (vector.detach().clone(), 0.3, 0.0)]
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value, _, _ in expected]
    for step in (1, 2, 3):
        for place, (parameter, (value, lr, decay)) in enumerate(zip((matrix, vector), expected, strict=True)):
            parameter.grad = torch.randn_like(parameter)
            first, second = moments[place]
            first.mul_(0.8).add_(0.2 * parameter.grad)
            second.mul_(0.95).add_(0.05 * parameter.grad**2)
            value.mul_(1 - lr * decay)
            value.sub_(lr * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6))
        adamw.step()
    for parameter, (value, _, _) in zip((matrix, vector), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-6)  # fp32, other order of products


def train_twice(rank: int, world: int, members: str, argv: list[str]) -> None:
    """The command in this process, with a folder of members of its own: half of the run, then the rest."""
    from llm2clip_plugin.stages.tower.config import TRAIN_TOWER
    from llm2clip_plugin.stages.tower.run import train_tower

    optimizers.__path__.append(members)
    train_tower(TRAIN_TOWER.parse(argv))


def test_a_file_in_the_folder_is_an_optimizer_that_resumes(tmp_path: Path):
    members = tmp_path / "members"
    members.mkdir()
    (members / "adamax.py").write_text(ADAMAX)
    make_all(tmp_path)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    more = ("--optim.name", "adamax", "--deepspeed", "scripts/zero2.json", "--train.ema-decay", "0", *KEEP_ALL)
    run_ranks(train_twice, 1, str(members), options(tmp_path, straight, *more))
    resume_from_half(straight, cut)
    run_ranks(train_twice, 1, str(members), options(tmp_path, cut, *more))
    assert losses(cut) == losses(straight) and sorted(losses(cut)) == list(range(1, STEPS + 1))


def resume_from_half(straight: Path, cut: Path) -> None:
    """A run folder as a kill after a middle step leaves it."""
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "tower", ignore_errors=True)
    names = sorted(path.name for path in (cut / "checkpoints").glob("step-*"))
    shutil.rmtree(cut / "checkpoints" / names[-1])
    (cut / "checkpoints" / "latest").write_text(names[-2])


def wait_for(process: Process, ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_8_bit_adamw_killed_on_two_ranks_resumes_bit_by_bit(tmp_path: Path, stage: int):
    make_all(tmp_path)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    more = ("--optim.name", "adamw_8bit", "--deepspeed", f"scripts/zero{stage}.json")
    assert finish(start(options(tmp_path, straight, *more), 2)) == [0, 0]
    ranks = start(options(tmp_path, killed, *more), 2)
    wait_for(ranks[0], lambda: max(losses(killed), default=0) >= 5)
    os.kill(ranks[1].pid, signal.SIGSTOP)  # rank 0 waits for it, and goes on writing
    wait_for(ranks[0], lambda: list((killed / "checkpoints").glob("step-*")))
    for process in ranks:
        process.kill()
    finish(ranks)
    assert 5 <= max(losses(killed)) < STEPS
    assert finish(start(options(tmp_path, killed, *more), 2)) == [0, 0]
    assert losses(killed) == losses(straight) and sorted(losses(killed)) == list(range(1, STEPS + 1))
