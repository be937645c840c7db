"""AdamW against its formula; 8-bit AdamW under the launcher, killed and resumed."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_data import make_all
from torch.profiler import ProfilerActivity, profile
from tower_runs import STEPS, finish, killed_at, losses, options, start
from train_helpers import run_ranks, tiny_batch, tiny_engine, tiny_step

from llm2clip_plugin.train.checkpoint import on_host
from llm2clip_plugin.train.optim import (
    OPTIMIZERS,
    AdamW,
    Trained,
    parameter_groups,
    set_lr,
)


class GroupedAdamW(AdamW):
    """AdamW with a group for each learning rate, under every ZeRO stage."""

    name = "grouped"


def test_adamw_is_the_formula_with_each_groups_rate_and_decay():
    """Loshchilov & Hutter 2019, algorithm 2, for a matrix with decay and a vector without, at
    different rates."""
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(3, 2))
    vector = torch.nn.Parameter(torch.randn(3))
    trained = [
        Trained(name="matrix", parameter=matrix, lr=0.1, decay=True),
        Trained(name="vector", parameter=vector, lr=0.3, decay=False),
    ]
    adamw = AdamW().make(
        parameter_groups(trained, 0.2), lr=9.0, betas=(0.8, 0.95), eps=1e-6
    )
    expected = [
        (matrix.detach().clone(), 0.1, 0.2),
        (vector.detach().clone(), 0.3, 0.0),
    ]
    moments = [
        (torch.zeros_like(value), torch.zeros_like(value)) for value, _, _ in expected
    ]
    for step in (1, 2, 3):
        for number, (parameter, (value, lr, decay)) in enumerate(
            zip((matrix, vector), expected, strict=True)
        ):
            parameter.grad = torch.randn_like(parameter)
            first, second = moments[number]
            first.mul_(0.8).add_(0.2 * parameter.grad)
            second.mul_(0.95).add_(0.05 * parameter.grad**2)
            value.mul_(1 - lr * decay)
            value.sub_(
                lr
                * (first / (1 - 0.8**step))
                / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
            )
        adamw.step()
    for parameter, (value, _, _) in zip((matrix, vector), expected, strict=True):
        # fp32, other order of products
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-6)


def trained_by(
    rank: int, world: int
) -> list[tuple[str, dict[str, int], dict[str, list[dict[str, torch.Tensor]]]]]:
    """For each ZeRO stage and precision: the groups of both optimizers, and the fp32 weights and
    moments of both."""
    OPTIMIZERS[GroupedAdamW.name] = GroupedAdamW
    results = []
    precisions = ("fp32", "bf16") if world < 3 else ("fp32",)
    for stage, precision, micro in itertools.product((1, 2), precisions, (4, 8)):
        groups = {}
        tensors = {}
        for name in ("grouped", "adamw"):
            torch.manual_seed(0)
            engine = tiny_engine(
                stage=stage, precision=precision, micro=micro, world=world, name=name
            )
            step = tiny_step(engine)
            for i in range(5 if precision == "fp32" else 1):
                set_lr(engine.groups, 1 - i / 10)
                step(tiny_batch(i, rank=rank, world=world))
            groups[name] = len(engine.groups)
            tensors[name] = [engine.weights(on_host), engine.moments(on_host)]
        results.append((f"ZeRO-{stage} {precision} {micro}", groups, tensors))
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_group_trains_as_a_group_for_each_rate_and_decay_does(world: int):
    """The norm sums in another order: an fp32 ulp or two, in steps of at most .02. A bf16 weight
    whose master is an ulp away may round apart, so that the second gradient differs in its third
    digit; so may a sum of 4 ranks in bf16."""
    for way, groups, tensors in run_ranks(trained_by, world)[0]:
        assert groups == {"grouped": 7, "adamw": 1}, way
        for expected, values in zip(tensors["grouped"], tensors["adamw"], strict=True):
            assert expected.keys() == values.keys()
            for key, value in values.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def sent_during_backward(rank: int, world: int) -> list[int]:
    """For each way: collectives that start inside of autograd's backward pass."""
    results = []
    for stage, precision, micro in (
        (1, "fp32", 16),
        (2, "bf16", 16),
        (1, "bf16", 8),
        (2, "fp32", 8),
    ):
        zero = {"stage": stage, "reduce_bucket_size": 700}
        engine = tiny_engine(
            stage=stage, precision=precision, micro=micro, world=world, zero=zero
        )
        step = tiny_step(engine)
        count = 0
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            step(tiny_batch(0, rank=rank, world=world))
        for event in trace.events() or []:
            parent = event.cpu_parent if event.name.startswith("c10d::") else None
            while parent is not None and not parent.name.startswith("autograd::engine"):
                parent = parent.cpu_parent
            count += parent is not None
        results.append(count)
    return results


def test_gradients_are_sent_during_the_backward_pass():
    """Where micro-batches are summed in fp32 for bf16, after it; under ZeRO-2 those of each
    micro-batch."""
    first, second, summed, cached = run_ranks(sent_during_backward, 2)[0]
    assert min(first, second) > 5
    assert summed == 0
    assert cached > first


@pytest.mark.slow
def test_8_bit_adamw_killed_on_two_ranks_resumes_bit_by_bit(tmp_path: Path):
    """The command under ZeRO-3; the engine under every stage: test_checkpoint.py."""
    make_all(tmp_path)
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    more = ("--optim.name", "adamw_8bit", "--deepspeed", "scripts/zero3.json")
    assert finish(start(options(tmp_path, straight, *more), 2)) == [0, 0]
    killed_at(options(tmp_path, killed, *more), killed, 6)
    assert finish(start(options(tmp_path, killed, *more), 2)) == [0, 0]
    assert losses(killed) == losses(straight)
    assert sorted(losses(killed)) == list(range(1, STEPS + 1))
