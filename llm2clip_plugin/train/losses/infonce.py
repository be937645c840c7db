"""CLIP's loss, symmetric InfoNCE: each anchor picks its positive among all of the batch, each positive its anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm2clip_plugin.train.distributed import Group, gather_rows, sum_own_rows, world_size
from llm2clip_plugin.train.losses.base import EXCLUDED, Features, LossTerm, PairBlocks, stack_ids, with_gradients


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
    """Symmetric InfoNCE of this rank's b pairs against all N (Radford et al. 2021, arXiv 2103.00020, figure 3).

    loss_r = 1/(2b) sum_i [ lse_j(s x_i.y_j) - s x_i.y_i ] + 1/(2b) sum_j [ lse_i(s x_i.y_j) - s x_j.y_j ],
    i and j over this rank's pairs, the inner index over all N. The mean of loss_r over ranks is the loss of
    the whole batch.

    Args:
        anchor_bD, positive_bD: x and y, L2-normalized, any float dtype; products are taken in it, the rest in fp32.
        scale: s, one element, already exponentiated.
        caption_hashes, image_ids: (b,) or (j, b) int64; off-diagonal pairs with an equal id are left out of both sums.
        block: rows of the logits held at once; 0 chooses by device.
        group: ranks that hold the batch, b rows on each; None is the default group.

    The gradient with respect to the features is that of sum_r loss_r (golden D: local loss, gathered with
    gradient); with respect to ``scale`` it is this rank's part, so that the mean over ranks is right. Weights put on
    the result must be the same on every rank. Not for a batch of one pair, which has no negatives.

    Two passes over the blocks: sums of exponentials of rows and columns, then gradients from them. A block's logits
    serve its rows (anchor to positive) and its columns (positive to anchor) at once; the columns' sums are joined over
    blocks and ranks. Four matrix products in all, against three of the full matrix.
    """
    with torch.no_grad():
        blocks = PairBlocks(anchor_bD, positive_bD, stack_ids(caption_hashes, image_ids), block, group)
        s = scale.float().reshape(())
        row, column, pair_b, logits_RN = _exponential_sums(blocks, s)
        loss = 0.5 * (row.log_minus(pair_b) + column.part(blocks.own_columns).log_minus(pair_b)).mean()
    inputs = (anchor_bD, positive_bD, scale)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        return loss
    with torch.no_grad():
        grads = _gradients(blocks, s, row, column, logits_RN)
    return with_gradients(loss, inputs, grads)


@dataclass(frozen=True, kw_only=True)
class InfoNCE(LossTerm):
    """``--loss.terms infonce``: the loss of CLIP and LLM2CLIP."""

    name: ClassVar[str] = "infonce"

    def __call__(self, features: Features) -> Tensor:
        scale, positive_bD = features.log_scale.exp(), features.positive_bkD[:, 0]
        return contrastive_loss(features.anchor_bD, positive_bD, scale, **features.of_batch)


TERM = InfoNCE


@dataclass
class _ExpSums:
    """sum_j exp(x_j) of many rows as ``total * exp(top)``: a rounded logarithm near 100 would cost 1e-5 of it."""

    top: Tensor  # the largest x
    total: Tensor  # sum of exp(x - top)

    def part(self, which: slice) -> _ExpSums:
        return _ExpSums(self.top[which], self.total[which])

    def log_minus(self, logit: Tensor) -> Tensor:
        """log of the sum, minus a logit."""
        return (self.top - logit) + self.total.log()

    @classmethod
    def joined(cls, parts: list[_ExpSums]) -> _ExpSums:
        """The sums over all parts."""
        top = torch.stack([part.top for part in parts]).amax(0)
        return cls(top, sum((part.total * (part.top - top).exp() for part in parts), torch.zeros_like(top)))


def _exponential_sums(blocks: PairBlocks, s: Tensor) -> tuple[_ExpSums, _ExpSums, Tensor, Tensor | None]:
    """Sums of each local row (b,), of each column over all ranks (N,), and the pairs' own logits (b,).

    The logits (b, N) themselves are returned too if they are a single block, else None.
    """
    device = blocks.anchor_bD.device
    row = _ExpSums(torch.empty(blocks.rows, device=device), torch.empty(blocks.rows, device=device))
    pair_b = torch.empty(blocks.rows, device=device)
    columns: list[_ExpSums] = []
    logits_RN = None
    for rows in blocks:
        logits_RN = _logits(blocks, rows, s)
        pair_b[rows] = blocks.diagonal(rows, logits_RN)
        row.top[rows] = logits_RN.amax(1)
        row.total[rows] = (logits_RN - row.top[rows, None]).exp_().sum(1)
        top_N = logits_RN.amax(0)
        columns.append(_ExpSums(top_N, (logits_RN - top_N).exp_().sum(0)))
        columns = [_ExpSums.joined(columns)]
    if world_size(blocks.group) > 1:
        tops_WN, totals_WN = (gather_rows(x[None], blocks.group) for x in (columns[0].top, columns[0].total))
        columns = [_ExpSums.joined([_ExpSums(*pair) for pair in zip(tops_WN, totals_WN, strict=True)])]
    return row, columns[0], pair_b, logits_RN if blocks.block >= blocks.rows else None


def _logits(blocks: PairBlocks, rows: slice, s: Tensor) -> Tensor:
    """(R, N) fp32 s x_i.y_j, EXCLUDED for excluded pairs."""
    logits_RN = blocks.cosines(rows).mul_(s)
    excluded_RN = blocks.excluded(rows)
    return logits_RN if excluded_RN is None else logits_RN.masked_fill_(excluded_RN, EXCLUDED)


def _gradients(
    blocks: PairBlocks, s: Tensor, row: _ExpSums, column: _ExpSums, all_logits_RN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_r loss_r: local anchors (b, D), local positives (b, D), this rank's part for the scale ()."""
    anchor_grad_bD = torch.empty(blocks.anchor_bD.shape, device=blocks.anchor_bD.device)
    positive_grad_ND = torch.zeros(blocks.positive_ND.shape, device=blocks.anchor_bD.device)
    row_weight_b, column_weight_N = 0.5 / blocks.rows / row.total, 0.5 / blocks.rows / column.total
    for rows in blocks:
        logits_RN = _logits(blocks, rows, s) if all_logits_RN is None else all_logits_RN
        grad_RN = (logits_RN - row.top[rows, None]).exp_().mul_(row_weight_b[rows, None])
        grad_RN.addcmul_(logits_RN.sub_(column.top).exp_(), column_weight_N)
        blocks.diagonal(rows, grad_RN).sub_(1 / blocks.rows)
        grad_RN = grad_RN.to(blocks.anchor_bD.dtype)
        anchor_grad_bD[rows] = (grad_RN @ blocks.positive_ND).float()
        positive_grad_ND.add_((grad_RN.T @ blocks.anchor_bD[rows]).float())
    scale_grad = (anchor_grad_bD * blocks.anchor_bD.float()).sum()
    positive_grad_bD = sum_own_rows(positive_grad_ND, blocks.group)
    return anchor_grad_bD.mul_(s), positive_grad_bD * s, scale_grad
