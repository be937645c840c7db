"""The optimizer's settings, its parameter groups and the learning-rate schedule.

Groups: layer-wise lr decay (Bao et al. 2021, arXiv 2106.08254, section 3.2): a parameter at depth d of ``top`` gets
``layer_decay ** (top - d)`` of the learning rate. Weight decay is not applied to vectors (norms, biases, class tokens,
the logit scale) and position tables.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm2clip_plugin.train.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parameter that trains."""

    name: str
    parameter: nn.Parameter
    lr: float  # peak learning rate
    decay: bool  # whether weight decay applies


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Fraction of the peak learning rate at ``step`` (the first is 0)."""
    warmup = config.warmup(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def is_vector(parameter: torch.Tensor) -> bool:
    """Whether at most one dimension is larger than 1: biases, norms, class tokens, (1,) scales."""
    return parameter.numel() == max(parameter.shape, default=1)


def parameter_groups(trained: Iterable[Trained], weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups, one per (learning rate, weight decay), in order of first use.

    The schedule multiplies the ``peak_lr`` of a group.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for item in trained:
        key = (item.lr, item.decay)
        decay = weight_decay if item.decay else 0.0
        group = groups.setdefault(key, {"params": [], "lr": item.lr, "peak_lr": item.lr, "weight_decay": decay})
        group["params"].append(item.parameter)
    return list(groups.values())


def set_lr(groups: list[dict[str, Any]], factor: float) -> None:
    """Set the learning rate of each group to ``factor`` times its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
