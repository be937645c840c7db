"""What the engine, checkpoints and the dry run need to know of an optimizer.

A *master* is a tensor that the optimizer updates: a parameter under ZeRO-0; under ZeRO-1 to 3 this rank's part of a
flat fp32 buffer that holds many parameters, whose boundaries have nothing to do with those of the part. Checkpoints
are independent of that: they hold one tensor for each parameter and moment, ``NAME.exp_avg``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

State = dict[str, Any]  # optimizer.state[master]


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec(ABC):
    """One optimizer. Subclasses are frozen dataclasses; their fields are the optimizer's own settings, with defaults,
    which ``--optimizer-args NAME=VALUE`` sets.

    If the moments are ordinary tensors of the master's shape, ``make`` and ``empty_state`` are all there is to define.
    """

    name: ClassVar[str]  # of ``--optimizer``
    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")  # keys of a state that checkpoints hold
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

    def keys(self, moment: str) -> tuple[str, ...]:
        """Keys of the elementwise tensors that make up a moment."""
        return (moment,)

    def expose(self, state: State, moment: str) -> dict[str, Tensor]:
        """The ``keys`` of a moment that a state lacks, as tensors of the master's shape, to be read or overwritten."""
        return {}

    def absorb(self, state: State, moment: str, exposed: dict[str, Tensor]) -> None:  # noqa: B027
        """Put exposed tensors, overwritten in the meantime, into the state."""

    def pack(self, moment: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds of one parameter: its ``keys`` of a moment, put together from all ranks (fp32, on the
        training device)."""
        return values

    def unpack(self, moment: str, saved: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """The inverse of ``pack``; {} if the checkpoint has no such moment of the parameter.

        Raises ValueError for the states of an optimizer that this one cannot continue from.
        """
        value = saved(moment)
        if value is not None and not value.is_floating_point():
            raise ValueError(
                f"the checkpoint holds {moment} as {value.dtype}, which {self.name} cannot read: resume with the "
                "--optimizer that wrote it"
            )
        return {} if value is None else {moment: value}
