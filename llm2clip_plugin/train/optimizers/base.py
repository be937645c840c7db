"""What the engine, checkpoints and the dry run need to know of an optimizer.

A *master* is a tensor that the optimizer updates: a parameter under ZeRO-0; under ZeRO-1 to 3 this rank's part of a
flat fp32 buffer that holds many parameters, whose boundaries have nothing to do with those of the part. Checkpoints
are independent of that: they hold one tensor for each parameter and moment, ``NAME.exp_avg``, unless ``by_rank``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

State = dict[str, Any]  # optimizer.state[master]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(ABC):
    """One optimizer. Subclasses are frozen dataclasses; their fields are the optimizer's own settings, with defaults,
    which ``--optimizer-args NAME=VALUE`` sets.

    ``make`` and ``empty_state`` are all there is to define where the moments are fp32 tensors of the master's shape.
    """

    name: ClassVar[str]  # of ``--optimizer``
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")  # keys of a state that checkpoints hold
    # checkpoints hold the moments of each rank's masters as they are: resumed on as many ranks, at the same ZeRO stage
    by_rank: ClassVar[bool] = False
    state_bytes: ClassVar[float] = 8.0  # of the moments of one parameter
    supports_offload: ClassVar[bool] = False  # DeepSpeed's CPU Adam computes the same on offloaded states
    deepspeed_types: ClassVar[tuple[str, ...]] = ()  # optimizer.type in a DeepSpeed JSON that means this optimizer
    deepspeed_settings: ClassVar[Mapping[str, Any]] = {"zero_allow_untested_optimizer": True}  # needed to run it

    @abstractmethod
    def make(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
    ) -> torch.optim.Optimizer:
        """The optimizer over parameter groups that have their own ``lr`` and ``weight_decay``."""

    @abstractmethod
    def empty_state(self, optimizer: torch.optim.Optimizer, master: Tensor, updates: int) -> State:
        """The state of a master after ``updates`` updates, with all moments zero."""
