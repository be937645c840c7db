"""An exponential moving average of the trained weights: of the fp32 masters, by the rank that updates them.

average <- d average + (1 - d) weight, d = min(decay, (1 + n) / (10 + n)) after n updates, so that early weights are
forgotten quickly. Under ZeRO each rank averages its partition of the masters, without ZeRO all weights; nothing is
sent until a checkpoint is saved. An average of bf16 weights would not move with updates below a bf16 ulp.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.tensor_files import HostCopies


class MovingAverage:
    """fp32 averages, in the layout of the optimizer's flat partitions."""

    def __init__(self, engine: Engine, decay: float, *, updates: int = 0, values: Mapping[str, Tensor] | None = None):
        """values: of a checkpoint, by name; without them the average starts at the weights. Raises ValueError if the
        masters are on NVMe."""
        self.engine = engine
        self.decay = decay
        self.updates = updates
        self.averages = [master.detach().clone() for master in engine.masters()]
        if not all(average.numel() for average in self.averages):
            raise ValueError("train.ema_decay does not support offload_optimizer to NVMe; use the device cpu, or 0")
        if values:
            with engine.exchanged(self.averages):
                engine.write_trained(values)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.engine.masters(), 1 - decay)

    def values(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """All averages by name, as made by ``copy``, {} on ranks without one; every rank must call this."""
        with self.engine.exchanged(self.averages):
            return self.engine.read_trained(copy)
