"""An exponential moving average of the trained weights, each parameter on one rank.

average <- d average + (1 - d) weight, d = min(decay, (1 + n) / (10 + n)) after n updates, so that early weights are
forgotten quickly. It averages the weights of the forward pass, not the fp32 masters.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip_plugin.train.distributed import rank, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.host_copies import HostCopies


class MovingAverage:
    """fp32 averages; rank r holds those of parameters r, r + world size, ..."""

    def __init__(self, engine: Engine, decay: float, *, updates: int = 0, values: Mapping[str, Tensor] | None = None):
        self.engine = engine
        self.decay = decay
        self.updates = updates
        self.averages: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(engine.trained):
            with engine.gathered([parameter]):
                if number % world_size() == rank():
                    start = values[name].to(engine.device) if values else parameter.detach()
                    self.averages[name] = start.to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.engine.trained:
            with self.engine.gathered([parameter]):
                if name in self.averages:
                    self.averages[name].lerp_(parameter.detach().float(), 1 - decay)

    def values(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """All averages as made by ``copy``, {} on ranks without one; every rank must call this."""
        gathered: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self.engine.trained):
            owner = number % world_size()
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 replaces a parameter by an empty tensor
            value = self.averages[name] if owner == rank() else torch.empty(shape, device=self.engine.device)
            if world_size() > 1:
                dist.broadcast(value, src=owner)
            if copy:
                gathered[name] = copy(name, value)
        return gathered
