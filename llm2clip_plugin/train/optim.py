"""AdamW's parameter groups and the learning rate's course.

Groups: layer-wise lr decay (Bao et al. 2021, arXiv 2106.08254, section 3.2): a parameter of depth d out of
``top`` gets ``layer_decay ** (top - d)`` of the learning rate. Weight decay is left off vectors (norms, biases,
class tokens, the logit scale) and off tables of positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5  # peak learning rate of the tower's last block
    head_lr: float = 0.0  # peak learning rate of projection, text adapter and logit scale; 0: as lr
    weight_decay: float = 0.05  # not on norms, biases, class token, positions, logit scale
    layer_decay: float = 0.85  # lr factor from a block to the one below it; 1: none
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW's
    eps: float = 1e-8  # AdamW's
    max_grad_norm: float = 5.0  # gradient clipping by global norm; 0: none
    schedule: Schedule = "cosine"  # after the warm-up: cosine | linear (both to min_lr_ratio) | constant
    warmup_steps: int = 0  # steps of linear warm-up
    warmup_ratio: float = 0.0  # the same as a share of all steps; give one of the two
    min_lr_ratio: float = 0.0  # where the schedule ends, as a share of the peak

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"unknown optim.schedule {self.schedule!r}; known: {', '.join(get_args(Schedule))}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optim.warmup_steps {self.warmup_steps} and optim.warmup_ratio {self.warmup_ratio}: give one of them"
            )
        bounds = {
            "lr": (0.0, 10.0),
            "head_lr": (0.0, 10.0),
            "weight_decay": (0.0, 10.0),
            "layer_decay": (1e-3, 1.0),
            "eps": (1e-20, 1.0),
            "max_grad_norm": (0.0, math.inf),
            "warmup_ratio": (0.0, 1.0),
            "min_lr_ratio": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            if not low <= vars(self)[name] <= high:
                raise ValueError(f"optim.{name} {vars(self)[name]} must lie between {low} and {high}")

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``."""
        return self.warmup_steps or round(self.warmup_ratio * total_steps)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parameter to train and where it stands."""

    name: str
    parameter: nn.Parameter
    lr: float  # peak
    decay: bool  # gets weight decay


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Share of the peak learning rate at ``step`` (the first is 0)."""
    warmup = config.warmup(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def is_vector(parameter: torch.Tensor) -> bool:
    """Biases, norms, class tokens, (1,) scales: one axis longer than 1 at most."""
    return parameter.numel() == max(parameter.shape, default=1)


def parameter_groups(trained: Iterable[Trained], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups, one for each (learning rate, weight decay) that occurs, in order of first use.

    ``peak_lr`` of a group is what the schedule multiplies.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for item in trained:
        key = (item.lr, item.decay)
        decay = weight_decay if item.decay else 0.0
        group = groups.setdefault(key, {"params": [], "lr": item.lr, "peak_lr": item.lr, "weight_decay": decay})
        group["params"].append(item.parameter)
    return list(groups.values())


def set_lr(groups: list[dict[str, Any]], factor: float) -> None:
    """Put ``factor`` of each group's peak learning rate in force."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
