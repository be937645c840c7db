"""What ``--dry-run`` prints: steps, parameters, learning rates, memory, DeepSpeed's configuration."""

from __future__ import annotations

import json
from typing import Any

from llm2clip_plugin.train.deepspeed_config import EnginePlan, offloads_optimizer, zero_stage
from llm2clip_plugin.train.optim import Trained

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def state_bytes(trained: int, plan: EnginePlan, config: dict[str, Any], world: int) -> dict[str, float]:
    """Bytes a rank for weights, gradients and AdamW (two fp32 moments, and fp32 masters but for ZeRO-0).

    ZeRO-1 cuts AdamW's share by the ranks, ZeRO-2 gradients too, ZeRO-3 weights too. Activations are not in it.
    """
    stage, size = zero_stage(config), BYTES[plan.precision]
    masters = 0 if stage == 0 else 4
    parts = {"weights": size, "gradients": size, "AdamW": 8 + masters}
    cut = {"weights": stage >= 3, "gradients": stage >= 2, "AdamW": stage >= 1}
    shares = {name: trained * each / (world if cut[name] else 1) for name, each in parts.items()}
    if offloads_optimizer(config):
        shares["AdamW, on the host"] = shares.pop("AdamW")
    return shares


def describe_plan(plan: EnginePlan, config: dict[str, Any], trained: list[Trained], *, samples: int, world: int) -> str:
    """The whole plan as text."""
    count = sum(item.parameter.numel() for item in trained)
    passes = plan.total_steps * plan.global_batch / samples
    by_lr: dict[tuple[float, bool], int] = {}
    for item in trained:
        by_lr[item.lr, item.decay] = by_lr.get((item.lr, item.decay), 0) + item.parameter.numel()
    groups = "\n".join(
        f"    lr {lr:.3g}, weight decay {plan.weight_decay if decay else 0:g}: {number:,}"
        for (lr, decay), number in sorted(by_lr.items(), reverse=True)
    )
    memory = ", ".join(
        f"{name} {size / 2**30:.2f} GiB" for name, size in state_bytes(count, plan, config, world).items()
    )
    return (
        f"steps: {plan.total_steps} of {plan.global_batch} pairs, {passes:.2f} passes over {samples:,} samples\n"
        f"ranks: {world} x {plan.accumulation} micro-batches of {plan.micro_batch}\n"
        f"schedule: {plan.schedule}, {plan.warmup_steps} steps of warm-up\n"
        f"precision: {plan.precision}; ZeRO-{zero_stage(config)}\n"
        f"parameters that train: {count:,}\n{groups}\n"
        f"memory a rank without activations: {memory}\n"
        f"DeepSpeed:\n{json.dumps(config, indent=2)}"
    )
