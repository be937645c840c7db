"""SigLIP's loss: each pair of an anchor and a positive is classified alone, as matching or not."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.train.distributed import Group
from llm2clip_plugin.train.losses.base import (
    EXCLUDED,
    Features,
    LossTerm,
    PairBlocks,
    stack_ids,
    with_gradients,
)


def sigmoid_loss(
    anchor_bD: Tensor,
    positive_bD: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    caption_hashes: Tensor | None = None,
    image_ids: Tensor | None = None,
    block: int = 0,
    group: Group = None,
) -> Tensor:
    """SigLIP's pairwise loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1) of this rank's
    anchors, all positives.

    loss_r = -1/b sum_i sum_j log sigmoid(z_ij (s x_i.y_j + bias)), z = 1 on the pair and -1
    elsewhere.

    Arguments as for contrastive_loss; ``bias`` has one element. Start it near -ln(N), or the
    negatives drown the first steps.
    """
    # one pass: the loss of a pair depends on its own logit alone, its gradient is known with it
    with torch.no_grad():
        blocks = PairBlocks(
            anchor_bD, positive_bD, stack_ids(caption_hashes, image_ids), block, group
        )
        s = scale.float().reshape(())
        shift = bias.float().reshape(())
        loss = torch.zeros((), device=s.device)
        bias_grad = torch.zeros((), device=s.device)

        def slope(rows: slice) -> Tensor:
            logits_RN = blocks.cosines(rows).mul_(s).add_(shift)
            # now a pair's loss is softplus(logit), its slope sigmoid(logit)
            blocks.diagonal(rows, logits_RN).neg_()
            if (excluded_RN := blocks.excluded(rows)) is not None:
                logits_RN.masked_fill_(excluded_RN, EXCLUDED)
            loss.add_(F.softplus(logits_RN).sum() / blocks.rows)
            slope_RN = logits_RN.sigmoid_().div_(blocks.rows)
            blocks.diagonal(rows, slope_RN).neg_()
            bias_grad.add_(slope_RN.sum())
            return slope_RN

        grads = (*blocks.gradients(s, slope), bias_grad)
    return with_gradients(loss, (anchor_bD, positive_bD, scale, bias), grads)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(LossTerm):
    """``--loss.terms sigmoid``: captions against images, with a learned bias of the logits."""

    name: ClassVar[str] = "sigmoid"
    uses_bias: ClassVar[bool] = True

    def __call__(self, features: Features) -> Tensor:
        scale = features.log_scale.exp()
        positive_bD = features.positive_bkD[:, 0]
        return sigmoid_loss(
            features.anchor_bD, positive_bD, scale, features.bias, **features.of_batch
        )


TERM = Sigmoid
