"""What a step of the training loop sends and waits for, counted by torch.profiler.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.step_traffic --stages 1 2

Each rank has a GPU, or, on a machine with fewer, all run on the CPU.

A narrow tower with the blocks of an L/14 and the paper's layer decay; DeepSpeed's buckets shrink as
the tower does. Flushes are collectives that start inside of the backward pass. Host reads make the
host wait for a GPU; those of the optimizer are not counted, whose step counters are on the CPU
where there is no GPU.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from llm2clip_plugin.train.distributed import free_port
from llm2clip_plugin.train.engine import start_ranks
from llm2clip_plugin.train.step import Flags, SharedFlags
from scripts.benchmarks.common import parse
from scripts.benchmarks.step import TOWERS, make_batch, make_dual, our_step

L_PARAMETERS = 3.04e8  # of a ViT-L/14
# pairs of a rank; steps before the one that is counted, whose losses are printed, too
BATCH = 2
STEPS = 3
READS = ("aten::_local_scalar_dense", "tolist", "aten::equal")
HEADS = (
    "ZeRO | optimizer groups | collectives | flushes in backward | host reads | losses"
)


def count(rank: int, args: argparse.Namespace, stage: int, port: int) -> None:
    """Count one step of this rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(args.ranks),
        "LOCAL_SIZE": str(args.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    start_ranks()
    width, _, heads, intermediate = TOWERS["tiny"]
    TOWERS["deep"] = (width, args.blocks, heads, intermediate)
    # torch.profiler does not record it on a CPU
    Tensor.tolist = record_function("tolist")(Tensor.tolist)
    dual = make_dual("deep")
    shrunk = sum(p.numel() for p in dual.parameters()) / L_PARAMETERS
    step = our_step(
        dual, BATCH, args.precision, stage=stage, world=args.ranks, bucket=shrunk
    )
    batch = make_batch(BATCH)
    flags = SharedFlags(Flags)
    losses = []
    for _ in range(STEPS):
        loss, _ = step(batch, flags)
        losses.append(loss)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loss, _ = step(batch, flags)
        losses.append(loss)
        assert step.engine.grad_norm is not None  # the loop reports it
    if rank == 0:
        count_of = Counter(kinds(trace.events()))
        cells = [
            str(stage),
            str(len(step.engine.groups)),
            str(count_of["collective"]),
            str(count_of["flush"]),
            str(count_of["read"]),
            ", ".join(f"{loss:.6f}" for loss in losses),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def kinds(events: Any) -> Iterator[str]:
    """What each event is: collective, flush, read."""
    for event in events:
        above = ""
        parent = event.cpu_parent
        while parent is not None:
            above = f"{above} {parent.name}"
            parent = parent.cpu_parent
        if event.name.startswith("c10d::"):
            yield "collective"
            if "autograd::engine" in above:
                yield "flush"
        elif event.name in READS and "Optimizer.step" not in above:
            yield "read"


if __name__ == "__main__":
    stages = ([1, 2], "of ZeRO", 0, 1, 2, 3)
    precision = ("bf16", "of the step", "fp32", "bf16")
    counts = {"blocks": (24, "of the tower"), "ranks": (2, "processes")}
    args = parse(__doc__, rounds=0, stages=stages, precision=precision, **counts)
    if torch.cuda.device_count() < args.ranks:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # of the ranks
    print(f"| {HEADS} |")
    print("|---" * 6 + "|")
    for stage in args.stages:
        mp.spawn(count, (args, stage, free_port()), nprocs=args.ranks)
