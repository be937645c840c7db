"""ProCLIP's regularizer: features stay where a reference has them, and as far from each other as
there."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm2clip_plugin.train.distributed import Group
from llm2clip_plugin.train.losses.base import (
    Features,
    LossTerm,
    PairBlocks,
    with_gradients,
)

# of a squared distance that is divided by: equal features have no direction
LEAST = 1e-12


def structure_loss(
    anchor_bD: Tensor, reference_bD: Tensor, *, block: int = 0, group: Group = None
) -> Tensor:
    """The mean over the pairs i < j of the whole batch of smooth_l1(|x_i - x_j| - |r_i - r_j|),
    beta 1 (arXiv 2510.18795, ProCLIP's structural term).

    loss_r = 1/(b (N - 1)) sum_i sum_{j != i} smooth_l1(...), i over this rank's b rows, j over all
    N; the mean over ranks is the mean over all pairs. 0 for a batch of one row.

    anchor, reference: (b, D), L2-normalized; products are taken in fp32. block: rows of the
    distances held at once. The gradient with respect to the anchors is that of sum_r loss_r; the
    reference gets none.
    """
    with torch.no_grad():
        loss, grad_bD = _loss_and_gradient(
            anchor_bD.float(), reference_bD.float(), block, group
        )
    return with_gradients(loss, (anchor_bD,), (grad_bD,))


@dataclass(frozen=True, kw_only=True)
class Distill(LossTerm):
    """``--loss.terms infonce=1 distill=WEIGHT``: 1/b sum_i |x_i - r_i|^2 (ProCLIP's semantic term)
    + ``structure`` x structure_loss, x the tower's image features, r those of its reference tower
    (``--distill.reference``).

    Both parts are means, over images and over pairs of images, so that a weight means the same for
    any batch, ranks and micro-batches. ProCLIP sums both over the 512 pairs of a rank: lambda x
    (512 x distance + 512 x 511 / 2 x structure) here, thus structure = 511 / 2 = 255.5, and its
    lambda 4e-4 is the weight 4e-4 x 512 = 0.2048.
    """

    name: ClassVar[str] = "distill"
    needs_reference: ClassVar[bool] = True
    # weight of the structure relative to the distance; 0: the distance alone
    structure: float = 255.5

    def __call__(self, features: Features) -> Tensor:
        if features.reference_bD is None:
            raise ValueError(
                "loss term distill has no reference to compare with: "
                "this step has no reference tower"
            )
        anchor_bD = features.anchor_bD
        reference_bD = features.reference_bD
        loss = (anchor_bD.float() - reference_bD.float()).square().sum(-1).mean()
        if not self.structure:
            return loss
        structure = structure_loss(
            anchor_bD, reference_bD, block=features.block, group=features.group
        )
        return loss + self.structure * structure


TERM = Distill


def _loss_and_gradient(
    anchor_bD: Tensor, reference_bD: Tensor, block: int, group: Group
) -> tuple[Tensor, Tensor]:
    """One pass over blocks of rows against all columns. A pair is seen from both of its rows, on
    their ranks, so each rank has the complete gradient of its own rows and sends none."""
    rows = PairBlocks(anchor_bD, anchor_bD, None, block, group)
    targets = PairBlocks(reference_bD, reference_bD, None, block, group)
    pairs = max(1, rows.rows * (rows.columns - 1))
    loss = torch.zeros((), device=anchor_bD.device)
    grad_bD = torch.empty(rows.anchor_bD.shape, device=anchor_bD.device)
    for part in rows:
        square_RN = _squares(rows, part)
        target_RN = _squares(targets, part)
        distance_RN = square_RN.sqrt()
        difference_RN = distance_RN - target_RN.sqrt_()
        rows.diagonal(part, difference_RN).zero_()
        size_RN = difference_RN.abs()
        near_RN = 0.5 * size_RN.square()
        loss += torch.where(size_RN < 1, near_RN, size_RN - 0.5).sum() / pairs
        # d smooth_l1 / d distance x d distance / d x_i = clamp(difference) (x_i - x_j) / distance;
        # twice, as the pair counts in row j too
        distance_RN.clamp_(min=LEAST**0.5)
        slope_RN = difference_RN.clamp_(-1, 1).div_(distance_RN).mul_(2 / pairs)
        own_RD = slope_RN.sum(1, keepdim=True) * rows.anchor_bD[part]
        grad_bD[part] = own_RD - slope_RN @ rows.positive_ND
    return loss, grad_bD


def _squares(blocks: PairBlocks, rows: slice) -> Tensor:
    """(R, N) |x_i - x_j|^2 from the cosines and the rows' own lengths, which rounding leaves near
    1."""
    row_R = blocks.anchor_bD[rows].square().sum(1)
    column_N = blocks.positive_ND.square().sum(1)
    return (row_R[:, None] + column_N - 2 * blocks.cosines(rows)).clamp_(min=0)
