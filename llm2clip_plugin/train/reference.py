"""The frozen twin of a dual encoder's image side, which loss terms compare the tower with.

It is the tower as it was, or follows it as a moving average: twin <- d twin + (1 - d) weight after each step, of the
fp32 masters, with d constant: early weights are what it is there to keep. Every rank holds all of it and computes the
same from the same weights, which are gathered where they are partitioned (ZeRO-3) or rounded (bf16, fp16).
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.train.checkpoint import HostCopies
from llm2clip_plugin.train.distributed import rank
from llm2clip_plugin.train.engine import Engine

# An exponential moving average of the trained weights: of the fp32 masters, by the rank that updates them.


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


class Twin:
    """A copy of ``dual`` without text adapter, in evaluation mode. It is made before the engine, which may partition
    ``dual``, and then attached to it."""

    engine: Engine

    def __init__(self, dual: Any, *, decay: float | None) -> None:
        """decay: of the moving average; None: the twin stays as it is."""
        self.decay = decay
        self.module = copy.deepcopy(dual)
        self.module.text_adapter = None
        self.module.eval().requires_grad_(False)
        trained = {name for name, parameter in dual.named_parameters() if parameter.requires_grad}
        self._copied = {name: p for name, p in self.module.named_parameters() if name in trained}
        self._averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def attach(self, engine: Engine, values: Mapping[str, Tensor]) -> None:
        """Follow an engine over the module that was copied. values: of a checkpoint; {}: as copied."""
        self.engine = engine
        # copies, as the parameters below change their type in place
        start = {n: (values[n] if values else p).to(torch.float32, copy=True) for n, p in self._copied.items()}
        dtype = next(p.dtype for p in engine.module.parameters() if p.is_floating_point())
        self.module.to(engine.device, dtype)
        # the averages are the parameters themselves if these are fp32
        for name, parameter in self._copied.items():
            parameter.copy_(start[name])
            whole = parameter.dtype == torch.float32
            self._averages[name] = parameter.data if whole else start[name].to(engine.device)

    @torch.no_grad()
    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) preprocessed pixels -> (B, D), L2-normalized, float32, without gradient."""
        return self.module.encode_image(pixel_values)

    @torch.no_grad()
    def encode_with_patches(self, pixel_values: Tensor, patches: int) -> tuple[Tensor, Tensor]:
        """``encode_image``, and the patches (B, T, H) of the hidden state with this number, float32."""
        image_BD, patches_BTH, _ = self.module.encode_with_patches(pixel_values, patches=patches)
        return image_BD, patches_BTH

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average. Every rank must call this."""
        if self.decay is None:
            return
        for name, parameter in self.engine.trained:
            if name in self._averages:
                self._averages[name].lerp_(self.engine.fp32(parameter), 1 - self.decay)
                self._copied[name].copy_(self._averages[name])

    def values(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """fp32 values of what the engine trains, as made by ``copy``; {} on ranks without one."""
        return {name: copy(name, value) for name, value in self._averages.items()} if copy and rank() == 0 else {}
