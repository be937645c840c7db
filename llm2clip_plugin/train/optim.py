"""The optimizers, their parameter groups and the learning-rate schedule.

Groups: layer-wise lr decay (Bao et al. 2021, arXiv 2106.08254, section 3.2): a parameter at depth d of ``top`` gets
``layer_decay ** (top - d)`` of the learning rate. Weight decay is not applied to vectors (norms, biases, class tokens,
the logit scale) and position tables.

A *master* is a tensor that the optimizer updates: a parameter under ZeRO-0; under ZeRO-1 to 3 this rank's part of a
flat fp32 buffer that holds many parameters, whose boundaries have nothing to do with those of the part.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm2clip_plugin.options import unknown
from llm2clip_plugin.train.config import OptimConfig, from_named_args

BLOCK = 256  # values that share a magnitude, in bitsandbytes
State = dict[str, Any]  # optimizer.state[master]


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """``--optimizer adamw``: Loshchilov & Hutter 2019, arXiv 1711.05101, with fp32 moments; torch's own, fused on GPUs.

    A checkpoint holds one tensor for each parameter and moment, ``NAME.exp_avg``, independent of ranks and stage.
    """

    name: ClassVar[str] = "adamw"
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")  # keys of a state that checkpoints hold
    # checkpoints hold the moments of each rank's masters as they are: resumed on as many ranks, at the same ZeRO stage
    by_rank: ClassVar[bool] = False
    state_bytes: ClassVar[float] = 8.0  # of the moments of one parameter

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """The optimizer over parameter groups that have their own ``lr`` and ``weight_decay``."""
        # torch's own needs no C++ build, which takes minutes at first use; on CPUs the fused kernel rounds differently
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=torch.cuda.is_available())

    def empty_state(self, optimizer: Any, master: Tensor, updates: int) -> State:
        """The state of a master after ``updates`` updates, with all moments zero."""
        # one step for each master: a shared tensor would advance once per master
        fused = bool(optimizer.defaults.get("fused"))
        step: Any = torch.tensor(float(updates), device=master.device if fused else "cpu")
        if not isinstance(optimizer, torch.optim.AdamW):  # DeepSpeedCPUAdam counts in Python
            step = updates
        return {"step": step, **{moment: torch.zeros_like(master.data) for moment in self.moments}}


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(AdamW):
    """``--optimizer adamw_8bit``, as Hugging Face's Trainer calls it: bitsandbytes', a quarter of the states' memory.

    Dettmers et al. 2022 (arXiv 2110.02861): moments are stored in 8 bits, as an index into a table of 256 values from
    -1 (0 for exp_avg_sq) to 1 times the largest magnitude of their block of 256. A master smaller than
    ``min_8bit_size`` keeps fp32 moments. The blocks of a master end where no parameter does, so a checkpoint holds each
    rank's states as they are.
    """

    min_8bit_size: int = 4096  # values of a master from which its moments are in 8 bits

    name: ClassVar[str] = "adamw_8bit"
    moments: ClassVar[tuple[str, ...]] = ("state1", "absmax1", "state2", "absmax2")  # bitsandbytes' names
    by_rank: ClassVar[bool] = True
    state_bytes: ClassVar[float] = 2 * (1 + 4 / BLOCK)

    def make(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        try:
            from bitsandbytes.optim import AdamW8bit as Optimizer
        except ImportError as error:
            raise ValueError("optim.name adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
        return Optimizer(groups, lr=lr, betas=betas, eps=eps, min_8bit_size=self.min_8bit_size)

    def empty_state(self, optimizer: Any, master: Tensor, updates: int) -> State:
        in_8bit = master.numel() >= self.min_8bit_size
        state: State = {"step": updates}
        for number in (1, 2):
            state[f"state{number}"] = torch.zeros_like(master.data, dtype=torch.uint8 if in_8bit else torch.float32)
            if in_8bit:
                blocks = -(-master.numel() // BLOCK)
                state[f"absmax{number}"] = torch.zeros(blocks, dtype=torch.float32, device=master.device)
                table = optimizer.name2qmap["dynamic" if number == 1 else "udynamic"]
                state[f"qmap{number}"] = table.to(master.device)
        return state


OPTIMIZERS: dict[str, type[AdamW]] = {optimizer.name: optimizer for optimizer in (AdamW, AdamW8bit)}


def chosen_optimizer(config: OptimConfig) -> AdamW:
    """The chosen optimizer with its settings; ValueError names a setting that it does not have."""
    if config.name not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", config.name, OPTIMIZERS))
    return from_named_args(OPTIMIZERS[config.name], config.args, where="optim.args")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A parameter that trains."""

    name: str
    parameter: nn.Parameter
    lr: float  # peak learning rate
    decay: bool  # whether weight decay applies


def is_vector(parameter: Tensor) -> bool:
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


def set_lr(groups: list[dict[str, Any]], factor: float) -> None:
    """Set the learning rate of each group to ``factor`` times its peak."""
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
