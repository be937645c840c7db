"""Copies of the weights that follow the training: the moving average that is exported, and the frozen tower that loss
terms compare with.

average <- d average + (1 - d) weight after each step, of the fp32 masters: an average of bf16 weights would not move
with updates below a bf16 ulp. Under ZeRO each rank averages its partition of the masters, without ZeRO all weights;
nothing is sent until the values are read.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm2clip_plugin.train.checkpoint import HostCopies
from llm2clip_plugin.train.engine import Engine


class Reference:
    """A moving average of the trained weights, and the frozen module that computes with it, if there is one."""

    def __init__(
        self,
        engine: Engine,
        decay: float,
        *,
        warmup: bool = False,
        module: Any = None,
        updates: int = 0,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """decay: d; 1 stays at the weights of the start. warmup: d = min(decay, (1 + n) / (10 + n)) after n updates, so
        that early weights are forgotten quickly. module: of ``frozen_copy``. values: of a checkpoint, by name; without
        them the average starts at the weights. Raises ValueError if the masters are on NVMe."""
        self.engine, self.decay, self.warmup, self.updates = engine, decay, warmup, updates
        self.averages = [master.detach().clone() for master in engine.masters()]
        if not all(average.numel() for average in self.averages):
            raise ValueError("moving averages do not support offload_optimizer to NVMe; use the device cpu")
        if values:
            with engine.exchanged(self.averages):
                engine.write_trained(values)
        self.names = [name for name, _ in engine.trained]
        self.module = module
        if module is not None:
            dtype = next(p.dtype for p in engine.module.parameters() if p.is_floating_point())
            module.to(engine.device, dtype)
            own = dict(module.named_parameters())
            self.names = [name for name in self.names if name in own]
            self._show()

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average. Every rank must call this."""
        self.updates += 1
        if self.decay == 1:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        torch._foreach_lerp_(self.averages, self.engine.masters(), 1 - decay)
        if self.module is not None:
            self._show()

    def values(self, copy: HostCopies | None) -> dict[str, Tensor]:
        """The averages by name, as made by ``copy``, {} on ranks without one; every rank must call this."""
        with self.engine.exchanged(self.averages):
            return self.engine.read_trained(copy, self.names)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, 3, S, S) preprocessed pixels -> the module's features (B, D), L2-normalized, and the patches (B, T, H) of
        its hidden state ``layer``, None without one; float32, without gradient."""
        if layer is None:
            return self.module.encode_image(pixel_values), None
        image_BD, patches_BTH, _ = self.module.encode_with_patches(pixel_values, patches=layer)
        return image_BD, patches_BTH

    @torch.no_grad()
    def _show(self) -> None:
        """Copy the averages into the module, which every rank holds whole."""
        own = dict(self.module.named_parameters())
        with self.engine.exchanged(self.averages):
            self.engine.read_trained(lambda name, value: own[name].copy_(value), self.names)


def frozen_copy(dual: Any) -> Any:
    """The image side of a dual encoder in evaluation mode, to be made before DeepSpeed may partition ``dual``."""
    module = copy.deepcopy(dual)
    module.text_adapter = None
    return module.eval().requires_grad_(False)
