"""Copies of the weights that follow the training: the moving average that is exported, and the
reference tower that loss terms compare with."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm2clip_plugin.train.checkpoint import AVERAGES, REFERENCE, Loaded
from llm2clip_plugin.train.config import DistillConfig
from llm2clip_plugin.train.engine import Copy, Engine
from llm2clip_plugin.vision.dual import DualEncoder


class WeightAverage:
    """A moving average of the trained weights.

    average <- d average + (1 - d) weight after each step, of the fp32 masters: an average of bf16
    weights would not move with updates below a bf16 ulp. Under ZeRO each rank averages its
    partition of the masters, without ZeRO all weights; nothing is sent until the values are read.
    """

    def __init__(
        self,
        engine: Engine,
        decay: float,
        *,
        warmup: bool = False,
        updates: int = 0,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """decay: d; 1 stays at the weights of the start. warmup: d = min(decay, (1 + n) / (10 + n))
        after n updates, so that early weights are forgotten quickly. values: of a checkpoint, by
        name; without them the average starts at the weights."""
        self.engine = engine
        self.decay = decay
        self.warmup = warmup
        self.updates = updates
        self.averages = [master.detach().clone() for master in engine.masters()]
        if values:
            with engine.exchanged(self.averages):
                engine.write_trained(values)
        self.names = [name for name, _ in engine.trained]

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step to the average. Every rank must call this."""
        self.updates += 1
        if self.decay == 1:
            return
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.engine.masters(), 1 - decay)

    def values(self, copy: Copy | None) -> dict[str, Tensor]:
        """The averages by name, as made by ``copy``, {} on ranks without one; every rank must call
        this."""
        with self.engine.exchanged(self.averages):
            return self.engine.read_trained(copy, self.names)


class ReferenceTower(WeightAverage):
    """The tower that loss terms compare with: a moving average of the image side's weights, or
    those of the start (decay 1), in a frozen module that every rank holds whole."""

    def __init__(
        self,
        engine: Engine,
        decay: float,
        module: DualEncoder,
        *,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        """module: of ``copy_image_side``. decay, values: as of WeightAverage."""
        super().__init__(engine, decay, values=values)
        self.module = module
        floating = (p for p in engine.module.parameters() if p.is_floating_point())
        module.to(engine.device, next(floating).dtype)
        parameters = dict(module.named_parameters())
        self.names = [name for name in self.names if name in parameters]
        self._copy_into_module()

    def update(self) -> None:
        super().update()
        if self.decay < 1:
            self._copy_into_module()

    @torch.no_grad()
    def encode(
        self, pixel_values: Tensor, layer: int | None = None, **shapes: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, 3, S, S) preprocessed pixels -> the module's features (B, D), L2-normalized, and the
        patches (B, T, H) of its hidden state ``layer``, None without one; float32, without
        gradient. ``shapes``: spatial_shapes."""
        if layer is None:
            return self.module.encode_image(pixel_values, **shapes), None
        image_BD, patches_BTH, *_ = self.module.encode_with_patches(
            pixel_values, patches=layer, **shapes
        )
        return image_BD, patches_BTH

    @torch.no_grad()
    def _copy_into_module(self) -> None:
        parameters = dict(self.module.named_parameters())

        def copy_into(name: str, value: Tensor) -> Tensor:
            return parameters[name].copy_(value)

        with self.engine.exchanged(self.averages):
            self.engine.read_trained(copy_into, self.names)


def copy_image_side(dual: DualEncoder) -> DualEncoder:
    """The image side of a dual encoder in evaluation mode, to be made before DeepSpeed may
    partition ``dual``."""
    module = copy.deepcopy(dual)
    module.text_adapter = None  # type: ignore[assignment]
    return module.eval().requires_grad_(False)


class Averages(NamedTuple):
    """Those of a run; None for what it does not have."""

    exported: WeightAverage | None
    reference: ReferenceTower | None

    @property
    def by_file(self) -> dict[str, WeightAverage]:
        """Each by the name of its file in a checkpoint."""
        averages: dict[str, WeightAverage] = {}
        if self.exported is not None:
            averages[AVERAGES] = self.exported
        if self.reference is not None:
            averages[REFERENCE] = self.reference
        return averages


def make_averages(
    engine: Engine,
    image_side: DualEncoder | None,
    ema_decay: float,
    distill: DistillConfig,
    resumed: Loaded | None,
) -> Averages:
    """The average that is exported, where ``ema_decay`` is not 0, and the reference tower over an
    ``image_side``; both as the checkpoint has them, if the run resumes."""
    updates = 0
    exported_values = None
    reference_values = None
    if resumed is not None:
        updates = resumed.state.step
        exported_values = resumed.averages
        reference_values = resumed.reference
    exported = None
    if ema_decay:
        exported = WeightAverage(
            engine, ema_decay, warmup=True, updates=updates, values=exported_values
        )
    reference = None
    if image_side is not None:
        decay = distill.decay if distill.reference == "ema" else 1.0
        reference = ReferenceTower(engine, decay, image_side, values=reference_values)
    return Averages(exported, reference)
