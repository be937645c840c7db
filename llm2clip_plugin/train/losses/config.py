"""The settings of the training loss, and the term that they choose."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llm2clip_plugin.options.names import nearest
from llm2clip_plugin.train.distributed import Group
from llm2clip_plugin.train.losses import loss_terms
from llm2clip_plugin.train.losses.base import Features, LossTerm
from llm2clip_plugin.train.named_args import from_named_args
from llm2clip_plugin.vision.dual import DualConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training loss."""

    kind: str = "infonce"  # infonce (CLIP, LLM2CLIP) | sigmoid (SigLIP; needs dual.logit_bias_init)
    weight: float = 1.0  # factor of the loss
    block: int = 0  # rows of the logits held at once; 0: as many as fit 16 MiB on a CPU, 512 MiB on a GPU
    mask_same_caption: bool = True  # pairs with equal captions are not negatives of each other
    mask_same_image: bool = True  # pairs with the same image are not negatives of each other
    args: tuple[str, ...] = ()  # settings of this kind of loss alone, as NAME=VALUE

    def __post_init__(self) -> None:
        if self.kind not in loss_terms():
            hint = nearest(self.kind, loss_terms())
            raise ValueError(f"unknown loss.kind {self.kind!r}{hint}; known: {', '.join(loss_terms())}")
        if self.block < 0 or not math.isfinite(self.weight):
            raise ValueError(f"loss.block {self.block} must be >= 0 and loss.weight {self.weight} finite")
        self.term()

    def term(self) -> LossTerm:
        """The chosen term with its settings; ValueError names a setting that it does not have."""
        return from_named_args(loss_terms()[self.kind], self.args, where="loss.args")

    def check(self, dual: DualConfig) -> None:
        """Raise ValueError if the loss and the dual encoder are incompatible."""
        self.term().check(dual)


Terms = dict[str, Callable[[Features], Tensor]]  # name -> weighted loss; a step minimizes their sum


def weighted_terms(config: LossConfig, *, group: Group = None) -> Terms:
    """The terms of a configuration, over the batch of a group of ranks."""
    term = config.term()

    def weighted(features: Features) -> Tensor:
        hashes = features.caption_hashes if config.mask_same_caption else None
        image_ids = features.image_ids if config.mask_same_image else None
        return config.weight * term(
            dataclasses.replace(features, caption_hashes=hashes, image_ids=image_ids, block=config.block, group=group)
        )

    return {config.kind: weighted}
