"""SigLIP's loss: each pair of an anchor and a positive is classified by itself as matching or not."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.train.distributed import Group, sum_own_rows
from llm2clip_plugin.train.losses.base import EXCLUDED, Features, LossTerm, PairBlocks, stack_ids, with_gradients


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
    """SigLIP's pairwise loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1) of this rank's anchors, all positives.

    loss_r = -1/b sum_i sum_j log sigmoid(z_ij (s x_i.y_j + bias)), z = 1 on the pair and -1 elsewhere.

    Arguments as for contrastive_loss; ``bias`` has one element. Start it near -ln(N), or the negatives drown
    the first steps.
    """
    with torch.no_grad():  # one pass: the loss of a pair depends on its own logit alone, its gradient is known with it
        blocks = PairBlocks(anchor_bD, positive_bD, stack_ids(caption_hashes, image_ids), block, group)
        s, shift = scale.float().reshape(()), bias.float().reshape(())
        loss, anchor_grad_bD, positive_grad_ND, bias_grad = _loss_and_gradients(blocks, s, shift)
        scale_grad = (anchor_grad_bD * blocks.anchor_bD.float()).sum()
        grads = (anchor_grad_bD * s, sum_own_rows(positive_grad_ND, group) * s, scale_grad, bias_grad)
    return with_gradients(loss, (anchor_bD, positive_bD, scale, bias), grads)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(LossTerm):
    """``--loss.terms sigmoid``: the captions against the images, with a learned bias of the logits."""

    name: ClassVar[str] = "sigmoid"
    uses_bias: ClassVar[bool] = True

    def __call__(self, features: Features) -> Tensor:
        scale, positive_bD = features.log_scale.exp(), features.positive_bkD[:, 0]
        return sigmoid_loss(features.anchor_bD, positive_bD, scale, features.bias, **features.of_batch)


TERM = Sigmoid


def _loss_and_gradients(blocks: PairBlocks, s: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), gradients with respect to s x anchors (b, D), s x all positives (N, D) and the bias ()."""
    device, dtype = blocks.anchor_bD.device, blocks.anchor_bD.dtype
    anchor_grad_bD = torch.empty(blocks.anchor_bD.shape, device=device)
    positive_grad_ND = torch.zeros(blocks.positive_ND.shape, device=device)
    loss, bias_grad = torch.zeros((), device=device), torch.zeros((), device=device)
    for rows in blocks:
        logits_RN = blocks.cosines(rows).mul_(s).add_(shift)
        blocks.diagonal(rows, logits_RN).neg_()  # now every pair's loss is softplus(logit), its slope sigmoid(logit)
        excluded_RN = blocks.excluded(rows)
        if excluded_RN is not None:
            logits_RN.masked_fill_(excluded_RN, EXCLUDED)
        loss += F.softplus(logits_RN).sum() / blocks.rows
        grad_RN = logits_RN.sigmoid_().div_(blocks.rows)
        blocks.diagonal(rows, grad_RN).neg_()
        bias_grad += grad_RN.sum()
        grad_RN = grad_RN.to(dtype)
        anchor_grad_bD[rows] = (grad_RN @ blocks.positive_ND).float()
        positive_grad_ND.add_((grad_RN.T @ blocks.anchor_bD[rows]).float())
    return loss, anchor_grad_bD, positive_grad_ND, bias_grad
