"""What ``--dry-run`` prints: steps, parameters, learning rates, memory by ZeRO stage, DeepSpeed's configuration."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip_plugin.train.deepspeed_config import EnginePlan, zero_stage
from llm2clip_plugin.train.memory import Model, rank_bytes
from llm2clip_plugin.train.optim import Trained

GIB = 1 << 30
WORLDS = (1, 8, 64)  # GPUs that a plan is drawn for
NODE = 8  # GPUs of a node in the commands
ROOM = 0.9  # share of a GPU's memory that a plan fills; CUDA and the allocator's gaps have the rest
# DeepSpeed's section of scripts/zero0.json to zero3.json, "auto" left out
ZERO_FILES: dict[int, dict[str, Any]] = {
    0: {"stage": 0},
    1: {"stage": 1, "overlap_comm": True},
    2: {"stage": 2, "overlap_comm": True},
    3: {"stage": 3, "overlap_comm": True},
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What --dry-run assumes where there is no data yet."""

    images: int = 15_000_000  # captioned images; the paper's larger set
    captions: int = 2  # captions of one image: a short and a long one
    gpu_gib: float = 80.0  # memory of a GPU, in GiB: micro-batches are proposed for it

    def __post_init__(self) -> None:
        if self.images < 1 or self.captions < 1 or self.gpu_gib <= 0:
            raise ValueError(
                f"plan.images {self.images}, captions {self.captions}, gpu_gib {self.gpu_gib} must all be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Column:
    """The same run on a number of GPUs."""

    world: int
    micro_batch: int  # 0: the global batch can't be cut into equal shares, or not even one pair fits
    total: dict[int, float]  # ZeRO stage -> bytes of a GPU


def columns(
    model: Model, *, global_batch: int, micro_batch: int, gpu_gib: float, stages: Sequence[int] = tuple(ZERO_FILES)
) -> list[Column]:
    """One a number of GPUs: the micro-batch asked for (0: the largest that fits under ZeRO-1), and its memory."""
    found = []
    for world in WORLDS:
        share, rest = divmod(global_batch, world)
        sizes = [n for n in range(share, 0, -1) if share % n == 0] if not rest else []
        if micro_batch:
            sizes = [n for n in sizes if n == micro_batch]
        totals = {
            n: {
                stage: sum(rank_bytes(model, zero, world=world, global_batch=global_batch, micro_batch=n).values())
                for stage, zero in (_zero_for(model, stage) for stage in stages)
            }
            for n in sizes
        }
        fitting = [n for n in sizes if micro_batch or totals[n][1] <= ROOM * gpu_gib * GIB]
        best = fitting[0] if fitting else 0
        found.append(Column(world=world, micro_batch=best, total=totals.get(best, {})))
    return found


def _zero_for(model: Model, stage: int) -> tuple[int, dict[str, Any]]:
    """A stage and its section; half precision under stage 0 runs as stage 1 (see deepspeed_config)."""
    return stage, ZERO_FILES[1 if stage == 0 and model.precision != "fp32" else stage]


def describe_parameters(trained: list[Trained], weight_decay: float) -> str:
    """How many parameters train, with and without weight decay, at which peak learning rates."""
    sizes = {flag: sum(item.parameter.numel() for item in trained if item.decay is flag) for flag in (True, False)}
    rates = sorted({item.lr for item in trained})
    course = f"{rates[0]:.3g} to {rates[-1]:.3g} in {len(rates)} groups" if len(rates) > 1 else f"{rates[0]:.3g}"
    return (
        f"parameters that train: {sum(sizes.values()):,}; weight decay {weight_decay:g} on {sizes[True]:,}, "
        f"none on {sizes[False]:,}; peak learning rates {course}"
    )


def describe_run(plan: EnginePlan, config: dict[str, Any], *, samples: int, world: int) -> str:
    """Steps, ranks, schedule, precision of the run as it was asked for."""
    optim, passes = plan.optim, plan.total_steps * plan.global_batch / samples
    return (
        f"steps: {plan.total_steps} of {plan.global_batch} pairs, {passes:.2f} passes over {samples:,} samples\n"
        f"ranks: {world} x {plan.accumulation} micro-batches of {plan.micro_batch}\n"
        f"schedule: {optim.schedule}, {plan.warmup_steps} steps of warm-up, clipping at {optim.max_grad_norm:g}\n"
        f"precision: {plan.precision}; ZeRO-{zero_stage(config)}"
    )


def describe_rank(
    model: Model, plan: EnginePlan, config: dict[str, Any], *, world: int, gpu_gib: float, unit: str = "an image"
) -> str:
    """Expected memory of a rank of this run, part by part; ``unit``: what ``model.kept`` is counted for."""
    zero = config.get("zero_optimization", {})
    parts = rank_bytes(model, zero, world=world, global_batch=plan.global_batch, micro_batch=plan.micro_batch)
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    kept = model.kept
    how = f"{kept.blocks} blocks x {(kept.state if model.checkpointing else kept.block) / 1e6:.1f} MB"
    if model.checkpointing:
        share = f" in {1 / model.at_once:.2g} parts" if model.at_once < 1 else ""
        how += f" and one of {kept.block / 1e6:.1f} MB computed again{share}"
    total = sum(parts.values()) / GIB
    too_much = f"; more than a GPU of {gpu_gib:g} GiB has, see the micro-batches below" if total > gpu_gib else ""
    return (
        f"memory a rank, expected: {total:.2f} GiB = {listed}{too_much}\n"
        f"activations of {unit}: {model.peak / 1e6:.1f} MB ({how})"
    )


def describe_columns(found: list[Column], global_batch: int, gpu_gib: float, about: str = "") -> str:
    """The table of GPUs by ZeRO stages; ``about``: what else it is for."""
    stages = next((column.total for column in found if column.total), {})
    lines = ["  GPUs   share  micro-batch" + "".join(f"   ZeRO-{stage}" for stage in stages)]
    for column in found:
        if not column.micro_batch:
            lines.append(f"{column.world:6}   no micro-batch fits {gpu_gib:g} GiB, or divides {global_batch}")
            continue
        sizes = "".join(f"{size / GIB:9.1f}" for size in column.total.values())
        lines.append(f"{column.world:6} {global_batch // column.world:7} {column.micro_batch:12}{sizes}")
    files = f"scripts/zero{min(stages)}.json to zero{max(stages)}.json" if stages else "any ZeRO stage"
    return f"memory a GPU in GiB, expected, with {files}{about}:\n" + "\n".join(lines)


def describe_commands(
    script: str,
    words: Sequence[str],
    found: list[Column],
    train: tuple[int, int],
    *,
    before: Sequence[str] = (),
    option: str = "--train.micro-batch",
) -> str:
    """What comes before the run, and the run itself on each number of GPUs.

    words: its options; train: (global batch, micro-batch) of them; option: the micro-batch's, where it must be another.
    """
    global_batch, micro_batch = train
    lines = [f"  {line}" for line in before]
    for column in (column for column in found if column.micro_batch):
        other = column.micro_batch not in (micro_batch, global_batch // column.world)
        more = [option, str(column.micro_batch)] if other else []
        launcher = ["--num_gpus", str(column.world)] if column.world <= NODE else ["--hostfile", "hosts"]
        lines.append("  " + shlex.join(["deepspeed", *launcher, script, *words, *more]))
    nodes = WORLDS[-1] // NODE
    hosts = f"  (hosts: {nodes} lines like `node-1 slots={NODE}`; Slurm: scripts/slurm/torchrun.sbatch)"
    return "commands:\n" + "\n".join([*lines, hosts])


def describe_deepspeed(config: dict[str, Any]) -> str:
    """What DeepSpeed will get."""
    return f"DeepSpeed:\n{json.dumps(config, indent=2)}"
