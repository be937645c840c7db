"""InfoNCE over several captions of an image at once, short and long ones for example."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm2clip_plugin.train.losses.base import Features, LossTerm
from llm2clip_plugin.train.losses.infonce import contrastive_loss


@dataclass(frozen=True, kw_only=True)
class MultiPositive(LossTerm):
    """``--loss.terms multi_positive`` with ``--captions-per-image k``: loss = 1/k sum_p InfoNCE(x, y_p), y_p the p-th
    of each image's captions (as in DreamLIP, arXiv 2403.17007, whose images have several captions at once).

    An image's own captions are never negatives of each other. The cost is k times that of infonce, of which it is the
    mean over what one caption a step would draw. With one caption an image it is infonce.
    """

    name: ClassVar[str] = "multi_positive"
    uses_all_captions: ClassVar[bool] = True

    def __call__(self, features: Features) -> Tensor:
        scale = features.log_scale.exp()
        losses = [
            contrastive_loss(features.anchor_bD, positive_bD, scale, **features.of_batch)
            for positive_bD in features.positive_bkD.unbind(1)
        ]
        return torch.stack(losses).mean()


TERM = MultiPositive
