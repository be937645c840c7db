"""How a --dry-run prints: steps, parameters, memory by GPUs and ZeRO stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip_plugin.stages.run import warmup_note
from llm2clip_plugin.train.config import OptimConfig, TrainConfig
from llm2clip_plugin.train.deepspeed_config import EnginePlan, zero_stage
from llm2clip_plugin.train.memory import StepMemory, rank_bytes
from llm2clip_plugin.train.optim import Trained

GIB = 1 << 30
WORLDS = (1, 8, 64)  # numbers of GPUs that a run is planned for
FILLED = 0.9  # fraction of a GPU's memory that a plan fills; CUDA and the allocator's gaps have the rest


@dataclass(frozen=True, kw_only=True)
class Column:
    """The run on a number of GPUs."""

    world: int
    micro_batch: int  # 0: the ranks can't share the global batch equally, or not even one pair fits
    total: dict[int, float]  # ZeRO stage -> bytes of a GPU


def columns(
    memory: StepMemory, train: TrainConfig, gpu_gib: float, *, stages: Sequence[int] = (0, 1, 2, 3)
) -> list[Column]:
    """One for each number of GPUs: the run's micro-batch (0: the largest that fits under ZeRO-1) and its memory."""
    results = []
    for world in WORLDS:
        local, rest = divmod(train.global_batch, world)
        sizes = [] if rest else [n for n in range(local, 0, -1) if local % n == 0 and train.micro_batch in (0, n)]
        result = Column(world=world, micro_batch=0, total={})
        for size in sizes:
            total = {stage: _total(memory, stage, world, train.global_batch, size) for stage in stages}
            if train.micro_batch or total[1] <= FILLED * gpu_gib * GIB:
                result = Column(world=world, micro_batch=size, total=total)
                break
        results.append(result)
    return results


def _total(memory: StepMemory, stage: int, world: int, global_batch: int, micro_batch: int) -> float:
    """Bytes of a GPU with scripts/zeroN.json; half precision under stage 0 runs as stage 1 (see deepspeed_config)."""
    stage = 1 if stage == 0 and memory.precision != "fp32" else stage
    zero = {"stage": stage, "overlap_comm": stage > 0}
    return sum(rank_bytes(memory, zero, world=world, global_batch=global_batch, micro_batch=micro_batch).values())


def describe_run(plan: EnginePlan, config: dict[str, Any], *, samples: int, world: int) -> str:
    """Steps, ranks, schedule and precision."""
    optim, epochs = plan.optim, plan.total_steps * plan.global_batch / samples
    note = warmup_note(optim, plan.total_steps)
    warmup = f"{plan.warmup_steps} steps of warm-up" + (f" (note: {note})" if note else "")
    reduced = config.get("communication_data_type", plan.precision)
    return (
        f"steps: {plan.total_steps} of {plan.global_batch} pairs, {epochs:.2f} epochs of {samples:,} samples\n"
        f"ranks: {world} x {plan.accumulation} micro-batches of {plan.micro_batch}\n"
        f"schedule: {optim.schedule}, {warmup}, gradient clipping {optim.max_grad_norm:g}\n"
        f"precision: {plan.precision}, gradients reduced in {reduced}; ZeRO-{zero_stage(config)}"
    )


def describe_parameters(trained: list[Trained], optim: OptimConfig) -> str:
    """How many parameters train, with and without weight decay, at which peak learning rates."""
    sizes = {flag: sum(item.parameter.numel() for item in trained if item.decay is flag) for flag in (True, False)}
    rates = sorted({item.lr for item in trained})
    course = f"{rates[0]:.3g} to {rates[-1]:.3g} in {len(rates)} groups" if len(rates) > 1 else f"{rates[0]:.3g}"
    return (
        f"trainable parameters: {sum(sizes.values()):,}; weight decay {optim.weight_decay:g} on {sizes[True]:,}, "
        f"none on {sizes[False]:,}; peak learning rates {course}"
    )


def describe_rank(memory: StepMemory, plan: EnginePlan, config: dict[str, Any], *, world: int, gpu_gib: float) -> str:
    """Expected memory of a rank of this run, part by part."""
    zero, batches = config.get("zero_optimization", {}), (plan.global_batch, plan.micro_batch)
    parts = rank_bytes(memory, zero, world=world, global_batch=batches[0], micro_batch=batches[1])
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    total = sum(parts.values()) / GIB
    too_much = f"; more than a GPU of {gpu_gib:g} GiB holds, see the micro-batches below" if total > gpu_gib else ""
    return f"expected memory per rank: {total:.2f} GiB = {listed}{too_much}"


def describe_columns(table: list[Column], global_batch: int, gpu_gib: float, about: str = "") -> str:
    """The table of GPUs by ZeRO stage; ``about``: further assumptions."""
    stages = next((column.total for column in table if column.total), {})
    lines = ["  GPUs   local  micro-batch" + "".join(f"   ZeRO-{stage}" for stage in stages)]
    for column in table:
        sizes = "".join(f"{size / GIB:9.1f}" for size in column.total.values())
        row = f"{global_batch // column.world:7} {column.micro_batch:12}{sizes}"
        none = f"  no micro-batch fits into {gpu_gib:g} GiB or divides the global batch {global_batch}"
        lines.append(f"{column.world:6} {row if column.micro_batch else none}")
    return "\n".join([f"expected memory per GPU in GiB{about}:", *lines])
