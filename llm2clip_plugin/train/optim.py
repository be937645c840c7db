"""The optimizer's settings, its parameter groups and the learning-rate schedule.

Groups: layer-wise lr decay (Bao et al. 2021, arXiv 2106.08254, section 3.2): a parameter at depth d of ``top`` gets
``layer_decay ** (top - d)`` of the learning rate. Weight decay is not applied to vectors (norms, biases, class tokens,
the logit scale) and position tables.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from llm2clip_plugin.options.names import nearest
from llm2clip_plugin.train.named_args import from_named_args
from llm2clip_plugin.train.optimizers import optimizers
from llm2clip_plugin.train.optimizers.base import OptimizerSpec

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw | adamw_8bit (bitsandbytes: a quarter of the memory for optimizer states)
    args: tuple[str, ...] = ()  # settings of this optimizer alone, as NAME=VALUE (adamw_8bit: min_8bit_size=4096)
    lr: float = 1e-5  # peak learning rate of the tower's last block
    head_lr: float = 0.0  # peak learning rate of projection, text adapter and logit scale; 0: same as lr
    weight_decay: float = 0.05  # not applied to norms, biases, class token, positions, logit scale
    layer_decay: float = 0.85  # lr factor from a block to the one below it; 1: none
    betas: tuple[float, float] = (0.9, 0.98)  # decay rates of Adam's moments
    eps: float = 1e-8  # Adam's epsilon
    max_grad_norm: float = 5.0  # gradient clipping by global norm; 0: none
    schedule: Schedule = "cosine"  # after the warm-up: cosine | linear (both to min_lr_ratio) | constant
    warmup_steps: int = 0  # steps of linear warm-up
    warmup_ratio: float = 0.0  # warm-up as a fraction of all steps; set one of the two
    min_lr_ratio: float = 0.0  # where the schedule ends, as a fraction of the peak

    def __post_init__(self) -> None:
        if self.name not in optimizers():
            hint = nearest(self.name, optimizers())
            raise ValueError(f"unknown optimizer {self.name!r}{hint}; known: {', '.join(optimizers())}")
        self.optimizer()
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"unknown optim.schedule {self.schedule!r}; known: {', '.join(get_args(Schedule))}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optim.warmup_steps {self.warmup_steps} and optim.warmup_ratio {self.warmup_ratio}: set only one"
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
                raise ValueError(f"optim.{name} {vars(self)[name]} must be between {low} and {high}")

    def optimizer(self) -> OptimizerSpec:
        """The chosen optimizer with its settings; ValueError names a setting that it does not have."""
        return from_named_args(optimizers()[self.name], self.args, where="optim.args")

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``."""
        return self.warmup_steps or round(self.warmup_ratio * total_steps)


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
