"""Images against captions: CLIP's loss, symmetric InfoNCE, with one caption an image or several;
LIFT's, which has no negatives."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from llm2clip_plugin.train.distributed import Group, gather_rows, world_size
from llm2clip_plugin.train.losses.base import (
    EXCLUDED,
    Features,
    LossTerm,
    PairBlocks,
    stack_ids,
    with_gradients,
)


def contrastive_loss(
    anchor_bD: Tensor,
    positive_bD: Tensor,
    scale: Tensor,
    *,
    caption_hashes: Tensor | None = None,
    image_ids: Tensor | None = None,
    block: int = 0,
    group: Group = None,
) -> Tensor:
    """Symmetric InfoNCE of this rank's b pairs against all N (Radford et al. 2021, arXiv
    2103.00020, figure 3).

    loss_r = 1/(2b) sum_i [ lse_j(s x_i.y_j) - s x_i.y_i ] + 1/(2b) sum_j [ lse_i(s x_i.y_j) - s
    x_j.y_j ], i and j over this rank's pairs, the inner index over all N. The mean of loss_r over
    ranks is the loss of the whole batch.

    Args:
        anchor_bD, positive_bD: x and y, L2-normalized, any float dtype; products are taken in it,
            the rest in fp32.
        scale: s, one element, already exponentiated.
        caption_hashes, image_ids: (b,) or (j, b) int64; off-diagonal pairs with an equal id are
            left out of both sums.
        block: rows of the logits held at once; 0 chooses by device.
        group: ranks that hold the batch, b rows on each; None is the default group.

    The gradient with respect to the features is that of sum_r loss_r (golden D: local loss,
    gathered with gradient); with respect to ``scale`` it is this rank's part, so that the mean over
    ranks is right. Weights put on the result must be the same on every rank. Not for a batch of one
    pair, which has no negatives.

    Two passes over the blocks: sums of exponentials of rows and columns, then gradients from them.
    A block's logits serve its rows (anchor to positive) and its columns (positive to anchor) at
    once; the columns' sums are joined over blocks and ranks. Four matrix products in all, against
    three of the full matrix.
    """
    with torch.no_grad():
        blocks = PairBlocks(
            anchor_bD, positive_bD, stack_ids(caption_hashes, image_ids), block, group
        )
        s = scale.float().reshape(())
        row, column, pair_b, logits_RN = _exponential_sums(blocks, s)
        own_top_b, own_total_b = (x_N[blocks.own_columns] for x_N in column)
        there_b = row[0] - pair_b + row[1].log()
        back_b = own_top_b - pair_b + own_total_b.log()
        loss = 0.5 * (there_b + back_b).mean()
    inputs = (anchor_bD, positive_bD, scale)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return loss
    with torch.no_grad():
        grads = blocks.gradients(s, partial(_slope, blocks, s, row, column, logits_RN))
    return with_gradients(loss, inputs, grads)


@dataclass(frozen=True, kw_only=True)
class InfoNCE(LossTerm):
    """``--loss.terms infonce``: the loss of CLIP and LLM2CLIP."""

    name: ClassVar[str] = "infonce"

    def __call__(self, features: Features) -> Tensor:
        scale = features.log_scale.exp()
        positive_bD = features.positive_bkD[:, 0]
        return contrastive_loss(
            features.anchor_bD, positive_bD, scale, **features.of_batch
        )


@dataclass(frozen=True, kw_only=True)
class MultiPositive(LossTerm):
    """``--loss.terms multi_positive`` with ``--captions-per-image k``: loss = 1/k sum_p InfoNCE(x,
    y_p), y_p the p-th of each image's captions (as in DreamLIP, arXiv 2403.17007, whose images have
    several captions at once).

    An image's own captions are never negatives of each other. The cost is k times that of infonce,
    of which it is the mean over what one caption a step would draw. With one caption an image it is
    infonce.
    """

    name: ClassVar[str] = "multi_positive"
    uses_all_captions: ClassVar[bool] = True

    def __call__(self, features: Features) -> Tensor:
        scale = features.log_scale.exp()
        anchor_bD = features.anchor_bD
        losses = [
            contrastive_loss(anchor_bD, positive_bD, scale, **features.of_batch)
            for positive_bD in features.positive_bkD.unbind(1)
        ]
        return torch.stack(losses).mean()


@dataclass(frozen=True, kw_only=True)
class Cosine(LossTerm):
    """``--loss.terms cosine``: loss = 1/N sum_i (1 - x_i.y_i), the captions' mean if an image has
    several (LIFT, arXiv 2506.04209).

    No pair is compared with another: no logits, no communication, and any batch size gives the same
    loss in expectation. Not alone with a text adapter that trains: both sides may meet in one
    point, which costs nothing here. The side of the captions must be fixed (dual.adapter none), or
    another term must hold them apart.
    """

    name: ClassVar[str] = "cosine"
    uses_all_captions: ClassVar[bool] = True

    def __call__(self, features: Features) -> Tensor:
        cosine_bk = (features.anchor_bD[:, None] * features.positive_bkD).sum(-1)
        return (1 - cosine_bk.float()).mean()


TERM = [InfoNCE, MultiPositive, Cosine]


# sum_j exp(x_j) of many rows as ``total * exp(top)``, top the largest x: a rounded logarithm near
# 100 would cost 1e-5
ExpSums = tuple[Tensor, Tensor]


def _joined(parts: Iterable[ExpSums]) -> ExpSums:
    """The sums over all parts."""
    tops, totals = map(torch.stack, zip(*parts, strict=True))
    top = tops.amax(0)
    return top, (totals * (tops - top).exp()).sum(0)


def _exponential_sums(
    blocks: PairBlocks, s: Tensor
) -> tuple[ExpSums, ExpSums, Tensor, Tensor | None]:
    """Sums of each local row (b,), of each column over all ranks (N,), and the pairs' own logits
    (b,).

    The logits (b, N) themselves are returned too if they are a single block, else None.
    """
    pair_b = torch.empty(blocks.rows, device=blocks.anchor_bD.device)
    row_top_b = torch.empty_like(pair_b)
    row_total_b = torch.empty_like(pair_b)
    column: ExpSums | None = None
    logits_RN = None
    for rows in blocks:
        logits_RN = _logits(blocks, rows, s)
        pair_b[rows] = blocks.diagonal(rows, logits_RN)
        row_top_b[rows] = logits_RN.amax(1)
        row_total_b[rows] = (logits_RN - row_top_b[rows, None]).exp_().sum(1)
        top_N = logits_RN.amax(0)
        part = top_N, (logits_RN - top_N).exp_().sum(0)
        column = part if column is None else _joined([column, part])
    assert column is not None
    if world_size(blocks.group) > 1:
        of_rank_1SN = torch.stack(column)[None]
        tops_WN, totals_WN = gather_rows(of_rank_1SN, blocks.group).unbind(1)
        column = _joined(zip(tops_WN, totals_WN, strict=True))
    single_block = blocks.block >= blocks.rows
    all_logits_RN = logits_RN if single_block else None
    return (row_top_b, row_total_b), column, pair_b, all_logits_RN


def _logits(blocks: PairBlocks, rows: slice, s: Tensor) -> Tensor:
    """(R, N) fp32 s x_i.y_j, EXCLUDED for excluded pairs."""
    logits_RN = blocks.cosines(rows).mul_(s)
    excluded_RN = blocks.excluded(rows)
    if excluded_RN is not None:
        logits_RN.masked_fill_(excluded_RN, EXCLUDED)
    return logits_RN


def _slope(
    blocks: PairBlocks,
    s: Tensor,
    row: ExpSums,
    column: ExpSums,
    all_logits_RN: Tensor | None,
    rows: slice,
) -> Tensor:
    """(R, N) derivatives of sum_r loss_r by the logits."""
    logits_RN = _logits(blocks, rows, s) if all_logits_RN is None else all_logits_RN
    row_top_b, row_total_b = row
    column_top_N, column_total_N = column
    row_weight_R1 = 0.5 / blocks.rows / row_total_b[rows, None]
    column_weight_N = 0.5 / blocks.rows / column_total_N
    slope_RN = (logits_RN - row_top_b[rows, None]).exp_().mul_(row_weight_R1)
    slope_RN.addcmul_(logits_RN.sub_(column_top_N).exp_(), column_weight_N)
    blocks.diagonal(rows, slope_RN).sub_(1 / blocks.rows)
    return slope_RN
