"""An exponential moving average of the trained weights, cut over the ranks by parameter.

average <- d average + (1 - d) weight, d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first
steps don't linger. The weights are the ones that the forward pass uses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip_plugin.train.distributed import rank, world_size
from llm2clip_plugin.train.engine import Engine


class MovingAverage:
    """fp32 averages of the parameters whose number is this rank's, modulo the ranks."""

    def __init__(self, engine: Engine, decay: float, *, updates: int = 0, values: dict[str, Tensor] | None = None):
        self.engine = engine
        self.decay = decay
        self.updates = updates
        self.mine: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(engine.trained):
            with engine.gathered([parameter]):
                if number % world_size() == rank():
                    start = values[name].to(engine.device) if values else parameter.detach()
                    self.mine[name] = start.to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they stand after a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.engine.trained:
            with self.engine.gathered([parameter]):
                if name in self.mine:
                    self.mine[name].lerp_(parameter.detach().float(), 1 - decay)

    def values(self, *, keep: bool) -> dict[str, Tensor]:
        """All averages on the CPU; every rank calls, ``keep`` says who gets them."""
        gathered: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self.engine.trained):
            owner = number % world_size()
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty parameter behind
            value = self.mine[name] if owner == rank() else torch.empty(shape, device=self.engine.device)
            if world_size() > 1:
                dist.broadcast(value, src=owner)
            if keep:
                gathered[name] = value.to("cpu", copy=True)
        return gathered
