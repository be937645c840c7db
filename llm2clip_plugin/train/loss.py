"""Losses between images and captions over the batch of all ranks, in blocks of rows.

Shape letters: b this rank's pairs, N pairs over all ranks, R rows of one block, D joint width.
Row i of the images and row i of the texts are a pair; rank r holds the rows [r b, (r + 1) b) of the N.

Both losses compute their gradient in the forward pass, block by block, so that no matrix of N x N is ever
kept and nothing is communicated in the backward pass. Under an engine that averages the gradients of
parameters over ranks (DDP, DeepSpeed) the result is exactly the gradient of the loss of one big batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.train.distributed import Group, gather_rows, rank, sum_over_ranks, world_size

LossKind = Literal["infonce", "sigmoid"]
EXCLUDED = -1e9  # logit of a pair that counts neither as positive nor as negative; finite, so no inf - inf
BLOCK_LOGITS_CPU = 1 << 22  # 16 MiB of fp32: about what stays in cache
BLOCK_LOGITS_GPU = 1 << 27  # 512 MiB


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of the training loss."""

    kind: LossKind = "infonce"  # infonce (CLIP, LLM2CLIP) or sigmoid (SigLIP; needs the dual encoder's logit bias)
    weight: float = 1.0  # of the term in the step's sum
    block: int = 0  # rows of the logits held at once; 0: as many as fit 16 MiB on a CPU, 512 MiB on a GPU
    mask_same_caption: bool = True  # a pair whose caption equals another pair's caption is no negative of it
    mask_same_image: bool = True  # nor is a pair of the same image

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise ValueError(f"unknown loss.kind {self.kind!r}; known: {', '.join(get_args(LossKind))}")
        if self.block < 0 or not math.isfinite(self.weight):
            raise ValueError(f"loss.block {self.block} must be >= 0 and loss.weight {self.weight} finite")


def contrastive_loss(
    image_bD: Tensor,
    text_bD: Tensor,
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
        image_bD, text_bD: L2-normalised, any float dtype; products are taken in it, everything else in fp32.
        scale: s, one element, already exponentiated.
        caption_hashes, image_ids: (b,) int64; off-diagonal pairs with an equal value are left out of both sums.
        block: rows of the logits at once; 0 chooses by device.
        group: ranks that hold the batch, b rows on each; None is the default group.

    The gradient with respect to the features is that of sum_r loss_r (golden D: local loss, gathered with
    gradient); that with respect to ``scale`` is this rank's share of it, so that the mean over ranks is right.
    Weights put on the result must be the same on every rank. Not for one pair alone, which has no negatives.
    """
    ids_k2b = _stack_ids(caption_hashes, image_ids)
    return _InfoNCE.apply(image_bD, text_bD, scale, ids_k2b, block, group)  # pyright: ignore


def sigmoid_loss(
    image_bD: Tensor,
    text_bD: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    caption_hashes: Tensor | None = None,
    image_ids: Tensor | None = None,
    block: int = 0,
    group: Group = None,
) -> Tensor:
    """SigLIP's pairwise loss (Zhai et al. 2023, arXiv 2303.15343, algorithm 1) of this rank's images and all texts.

    loss_r = -1/b sum_i sum_j log sigmoid(z_ij (s x_i.y_j + bias)), z = 1 on the pair and -1 elsewhere.

    Arguments as for contrastive_loss; ``bias`` has one element. Start it near -ln(N), or the negatives drown
    the first steps.
    """
    ids_k2b = _stack_ids(caption_hashes, image_ids)
    return _Sigmoid.apply(image_bD, text_bD, scale, bias, ids_k2b, block, group)  # pyright: ignore


def _stack_ids(*ids: Tensor | None) -> Tensor | None:
    """(k, b) int64 of the ids that are given, or None."""
    given = [item.reshape(-1, item.shape[-1]) for item in ids if item is not None]
    return torch.cat(given) if given else None


class _Batch:
    """What both losses need of the batch: rows here, columns everywhere, who is excluded."""

    def __init__(
        self,
        image_bD: Tensor,
        text_bD: Tensor,
        ids_kb: Tensor | None,
        block: int,
        group: Group,
    ) -> None:
        if image_bD.shape != text_bD.shape or image_bD.ndim != 2:
            raise ValueError(f"images {tuple(image_bD.shape)} and texts {tuple(text_bD.shape)} must both be (b, D)")
        self.image_bD = image_bD.detach()
        self.text_ND = gather_rows(text_bD, group)
        self.group = group
        self.rows = len(image_bD)
        self.columns = len(self.text_ND)
        self.first = rank(group) * self.rows  # column of row 0's own text
        self.ids_kb = ids_kb
        self.ids_kN = None if ids_kb is None else gather_rows(ids_kb.T.contiguous(), group).T.contiguous()
        budget = BLOCK_LOGITS_CPU if image_bD.device.type == "cpu" else BLOCK_LOGITS_GPU
        self.block = block or max(16, budget // self.columns)

    def blocks(self) -> list[slice]:
        """The rows, a block at a time."""
        return [slice(start, min(start + self.block, self.rows)) for start in range(0, self.rows, self.block)]

    def cosines(self, part: slice) -> Tensor:
        """(R, N) fp32 x_i.y_j."""
        return (self.image_bD[part] @ self.text_ND.T).float()

    def own(self, part: slice, matrix_RN: Tensor) -> Tensor:
        """(R,) view of the block's pairs: row i, column first + i."""
        return matrix_RN.diagonal(self.first + part.start)[: part.stop - part.start]

    def excluded(self, part: slice) -> Tensor | None:
        """(R, N) bool: off-diagonal pairs that share an id."""
        if self.ids_kb is None or self.ids_kN is None:
            return None
        same_RN = self.ids_kb[0, part, None] == self.ids_kN[0]
        for ids_b, ids_N in zip(self.ids_kb[1:], self.ids_kN[1:], strict=True):
            same_RN |= ids_b[part, None] == ids_N
        self.own(part, same_RN).fill_(False)
        return same_RN

    @property
    def mine(self) -> slice:
        """This rank's of the N columns."""
        return slice(self.first, self.first + self.rows)


class _InfoNCE(torch.autograd.Function):
    """Two passes over the blocks: sums of exponentials of rows and columns, then gradients from them.

    A block's logits serve its rows (image to text) and its columns (text to image) at once; the columns'
    sums are joined over blocks and ranks. Four matrix products in all, against three of the full matrix.
    """

    @staticmethod
    def forward(ctx, image_bD, text_bD, scale, ids_kb, block, group):
        batch = _Batch(image_bD, text_bD, ids_kb, block, group)
        s = scale.detach().float().reshape(())
        row, column, pair_b, kept_RN = _exponential_sums(batch, s)
        loss = 0.5 * (row.minus(pair_b) + column.part(batch.mine).minus(pair_b)).mean()
        if any(ctx.needs_input_grad):
            grads = _gradients(batch, s, row, column, kept_RN)
            ctx.save_for_backward(*_as_inputs(grads, image_bD, text_bD, scale))
        return loss

    @staticmethod
    def backward(ctx, upstream):
        image, text, scale = ctx.saved_tensors
        return upstream * image, upstream * text, upstream * scale, None, None, None


@dataclass
class _Sums:
    """sum_j exp(x_j) of many rows as ``total * exp(top)``: a rounded logarithm near 100 would cost 1e-5 of it."""

    top: Tensor  # the largest x
    total: Tensor  # sum of exp(x - top)

    def part(self, which: slice) -> _Sums:
        return _Sums(self.top[which], self.total[which])

    def minus(self, pair: Tensor) -> Tensor:
        """log of the sum, minus the pair's own logit."""
        return (self.top - pair) + self.total.log()

    @classmethod
    def joined(cls, parts: list[_Sums]) -> _Sums:
        """The sums over all parts."""
        top = torch.stack([part.top for part in parts]).amax(0)
        return cls(top, sum((part.total * (part.top - top).exp() for part in parts), torch.zeros_like(top)))


def _exponential_sums(batch: _Batch, s: Tensor) -> tuple[_Sums, _Sums, Tensor, Tensor | None]:
    """Sums of each local row (b,), of each column over all ranks (N,), and the pairs' logits (b,).

    The logits themselves come back too where one block holds them all.
    """
    device = batch.image_bD.device
    row = _Sums(torch.empty(batch.rows, device=device), torch.empty(batch.rows, device=device))
    pair_b = torch.empty(batch.rows, device=device)
    columns: list[_Sums] = []
    logits_RN = None
    for part in batch.blocks():
        logits_RN = _logits(batch, part, s)
        pair_b[part] = batch.own(part, logits_RN)
        row.top[part] = logits_RN.amax(1)
        row.total[part] = (logits_RN - row.top[part, None]).exp_().sum(1)
        top_N = logits_RN.amax(0)
        columns.append(_Sums(top_N, (logits_RN - top_N).exp_().sum(0)))
        columns = [_Sums.joined(columns)]
    if world_size(batch.group) > 1:
        tops_WN, totals_WN = (gather_rows(x[None], batch.group) for x in (columns[0].top, columns[0].total))
        columns = [_Sums.joined([_Sums(*pair) for pair in zip(tops_WN, totals_WN, strict=True)])]
    return row, columns[0], pair_b, logits_RN if len(batch.blocks()) == 1 else None


def _logits(batch: _Batch, part: slice, s: Tensor) -> Tensor:
    """(R, N) fp32 s x_i.y_j with excluded pairs far below."""
    logits_RN = batch.cosines(part).mul_(s)
    excluded_RN = batch.excluded(part)
    return logits_RN if excluded_RN is None else logits_RN.masked_fill_(excluded_RN, EXCLUDED)


def _gradients(
    batch: _Batch, s: Tensor, row: _Sums, column: _Sums, kept_RN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_r loss_r: local images (b, D), local texts (b, D), this rank's share for the scale ()."""
    image_grad_bD = torch.empty(batch.image_bD.shape, device=batch.image_bD.device)
    text_grad_ND = torch.zeros(batch.text_ND.shape, device=batch.image_bD.device)
    row_weight_b, column_weight_N = 0.5 / batch.rows / row.total, 0.5 / batch.rows / column.total
    for part in batch.blocks():
        logits_RN = _logits(batch, part, s) if kept_RN is None else kept_RN
        grad_RN = (logits_RN - row.top[part, None]).exp_().mul_(row_weight_b[part, None])
        grad_RN.addcmul_(logits_RN.sub_(column.top).exp_(), column_weight_N)
        batch.own(part, grad_RN).sub_(1 / batch.rows)
        grad_RN = grad_RN.to(batch.image_bD.dtype)
        image_grad_bD[part] = (grad_RN @ batch.text_ND).float()
        text_grad_ND.add_((grad_RN.T @ batch.image_bD[part]).float())
    scale_grad = (image_grad_bD * batch.image_bD.float()).sum()
    text_grad_bD = sum_over_ranks(text_grad_ND, batch.group)[batch.mine]
    return image_grad_bD.mul_(s), text_grad_bD * s, scale_grad


def _as_inputs(grads: tuple[Tensor, ...], *inputs: Tensor) -> list[Tensor]:
    """Each gradient in the dtype and shape of its input."""
    return [grad.to(given.dtype).reshape(given.shape) for grad, given in zip(grads, inputs, strict=True)]


class _Sigmoid(torch.autograd.Function):
    """One pass: a pair's loss depends on its own logit alone, so its gradient is known with it."""

    @staticmethod
    def forward(ctx, image_bD, text_bD, scale, bias, ids_kb, block, group):
        batch = _Batch(image_bD, text_bD, ids_kb, block, group)
        s, shift = scale.detach().float().reshape(()), bias.detach().float().reshape(())
        loss, image_grad_bD, text_grad_ND, bias_grad = _sigmoid_sums(batch, s, shift)
        scale_grad = (image_grad_bD * batch.image_bD.float()).sum()
        text_grad_bD = sum_over_ranks(text_grad_ND, group)[batch.mine]
        grads = (image_grad_bD * s, text_grad_bD * s, scale_grad, bias_grad)
        ctx.save_for_backward(*_as_inputs(grads, image_bD, text_bD, scale, bias))
        return loss

    @staticmethod
    def backward(ctx, upstream):
        image, text, scale, bias = ctx.saved_tensors
        return upstream * image, upstream * text, upstream * scale, upstream * bias, None, None, None


def _sigmoid_sums(batch: _Batch, s: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), gradients for s x images (b, D), s x all texts (N, D) and the bias ()."""
    device, dtype = batch.image_bD.device, batch.image_bD.dtype
    image_grad_bD = torch.empty(batch.image_bD.shape, device=device)
    text_grad_ND = torch.zeros(batch.text_ND.shape, device=device)
    loss, bias_grad = torch.zeros((), device=device), torch.zeros((), device=device)
    for part in batch.blocks():
        logits_RN = batch.cosines(part).mul_(s).add_(shift)
        pair_R = batch.own(part, logits_RN)
        pair_R.neg_()  # now every pair's loss is softplus(logit), and its slope sigmoid(logit)
        excluded_RN = batch.excluded(part)
        if excluded_RN is not None:
            logits_RN.masked_fill_(excluded_RN, EXCLUDED)
        loss += F.softplus(logits_RN).sum() / batch.rows
        grad_RN = logits_RN.sigmoid_().div_(batch.rows)
        batch.own(part, grad_RN).neg_()
        bias_grad += grad_RN.sum()
        grad_RN = grad_RN.to(dtype)
        image_grad_bD[part] = (grad_RN @ batch.text_ND).float()
        text_grad_ND.add_((grad_RN.T @ batch.image_bD[part]).float())
    return loss, image_grad_bD, text_grad_ND, bias_grad
