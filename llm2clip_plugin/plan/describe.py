"""How a plan prints: steps, parameters, memory by GPUs and ZeRO stage."""

from collections.abc import Sequence
from typing import Any

from llm2clip_plugin.plan.memory import FILLED, StepMemory, rank_gib
from llm2clip_plugin.train.config import OptimConfig, TrainConfig
from llm2clip_plugin.train.optim import REDUCTION, Trained, zero_stage

WORLDS = (1, 8, 64)  # numbers of GPUs that a run is planned for


def describe_run(
    train: TrainConfig,
    optim: OptimConfig,
    deepspeed: dict[str, Any],
    trained: list[Trained],
    samples: int,
    world: int,
) -> str:
    """Steps, ranks, schedule, precision, and how many parameters train at which peak learning
    rates."""
    steps = train.steps(samples)
    _, micro_batch, accumulation = train.rows(world)
    epochs = steps * train.global_batch / samples
    sizes = [item.parameter.numel() for item in trained]
    decayed = sum(item.parameter.numel() for item in trained if item.decay)
    rates = sorted({item.lr for item in trained})
    peaks = f"{rates[0]:.3g}"
    if len(rates) > 1:
        peaks = f"{rates[0]:.3g} to {rates[-1]:.3g} ({len(rates)} rates)"
    zero = deepspeed["zero_optimization"]
    overlaps = zero["stage"] == 1 and zero.get("overlap_comm") and accumulation == 1
    reduced_in = deepspeed.get("communication_data_type", train.precision)
    sent = ""
    if zero["stage"] == 2 or overlaps:
        buckets = filled_buckets(sizes, zero["reduce_bucket_size"])
        sent = f", sent about {buckets} times during the backward pass"
    lines = [
        f"steps: {steps} of {train.global_batch} pairs, {epochs:.2f} epochs of {samples:,} samples",
        f"ranks: {world} x {accumulation} micro-batches of {micro_batch}",
        f"schedule: {optim.schedule}, {optim.warmup(steps)} steps of warm-up, "
        f"gradient clipping {optim.max_grad_norm:g}",
        f"precision: {train.precision}, gradients reduced in {reduced_in}{sent}; "
        f"ZeRO-{zero_stage(deepspeed)}",
        f"trainable parameters: {sum(sizes):,}; weight decay {optim.weight_decay:g} "
        f"on {decayed:,}, none on {sum(sizes) - decayed:,}; peak learning rates {peaks}",
    ]
    return "\n".join(lines)


def filled_buckets(sizes: Sequence[int], elements: float) -> int:
    """How often a bucket of so many elements is sent because the next parameter's gradient does not
    fit; ``sizes`` in the order of the forward pass. The last bucket is sent after the backward
    pass."""
    count = filled = 0
    for size in reversed(sizes):
        if filled + size > elements:
            count = count + 1
            filled = 0
        filled += size
    return count


def describe_memory(
    memory: StepMemory,
    train: TrainConfig,
    gpu_gib: float,
    *,
    about: str = "",
    stages: Sequence[int] = (0, 1, 2, 3),
    kept: StepMemory | None = None,
) -> str:
    """A table of GPUs by ZeRO stage, with scripts/zeroN.json: the run's micro-batch (0: the largest
    that fits under ZeRO-1) and a GPU's memory. ``kept``: what a step needs without gradient
    checkpointing, which is on where this does not fit."""

    def total(memory: StepMemory, stage: int, world: int, micro_batch: int) -> float:
        # as it runs, see train.optim
        stage = 1 if stage == 0 and memory.precision != "fp32" else stage
        return rank_gib(
            memory, {"stage": stage, **REDUCTION}, train, world, micro_batch
        )

    def micro_batches(world: int) -> list[int]:
        """That divide a rank's batch, the largest first; the run's alone if it names one."""
        local, rest = divmod(train.global_batch, world)
        if rest:
            return []
        sizes = [size for size in range(local, 0, -1) if local % size == 0]
        if train.micro_batch:
            return [size for size in sizes if size == min(train.micro_batch, local)]
        return [
            size for size in sizes if total(memory, 1, world, size) <= FILLED * gpu_gib
        ]

    head = "  GPUs   local  micro-batch"
    for stage in stages:
        head += f"   ZeRO-{stage}"
    if kept:
        head += "  checkpointing"
    lines = [f"expected memory per GPU in GiB{about}:", head]
    for world in WORLDS:
        sizes = micro_batches(world)
        if not sizes:
            lines.append(
                f"{world:6}   no micro-batch fits into {gpu_gib:g} GiB "
                f"or divides the global batch {train.global_batch}"
            )
            continue
        size = sizes[0]
        without = kept is not None and total(kept, 1, world, size) <= FILLED * gpu_gib
        used = kept if kept is not None and without else memory
        line = f"{world:6} {train.global_batch // world:7} {size:12}"
        for stage in stages:
            line += f"{total(used, stage, world, size):9.1f}"
        if kept is not None:
            line += f"{'off' if without else 'on':>15}"
        lines.append(line)
    return "\n".join(lines)
