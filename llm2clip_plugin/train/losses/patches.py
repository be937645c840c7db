"""The terms that read patches: captions find their image among its patches, patches stay where a
reference has them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.train.distributed import gather_rows, sum_own_rows
from llm2clip_plugin.train.losses.base import (
    EXCLUDED,
    Features,
    LossTerm,
    PairBlocks,
    stack_ids,
    with_gradients,
)


@dataclass(frozen=True, kw_only=True)
class PatchCaptions(LossTerm):
    """``--loss.terms infonce=1 patch_captions=WEIGHT``: symmetric InfoNCE over l_ij = s cos(v_ij,
    y_j), where caption j pools the patches k_it of image i: v_ij = sum_t softmax_t(k_it.y_j /
    temperature) k_it.

    The pairs are FLAIR's (arXiv 2412.03561, text-conditioned attention pooling): an image is
    compared with a caption as that caption pools it. With v_ii in place of v_ij, captions can be
    told apart without looking at the image. Here keys and values are the patches' features in the
    space of the captions, so nothing is added to the tower; an image's first caption alone is used.
    The cost grows with the square of the batch: 16 N N T D operations.
    """

    name: ClassVar[str] = "patch_captions"
    reads: ClassVar[Literal["patch_features"]] = "patch_features"
    # hidden state of the tower, as LLaVA's mm_vision_select_layer; -2: the block before the last
    layer: int = -2
    temperature: float = 0.1  # of the softmax over the patches of an image

    def __call__(self, features: Features) -> Tensor:
        if features.patch_features_bTD is None:
            raise ValueError(
                "loss term patch_captions has no patches to pool: this step encodes no images"
            )
        inputs = (
            features.patch_features_bTD,
            features.positive_bkD[:, 0],
            features.log_scale.exp(),
        )
        with torch.no_grad():
            loss, grads = _loss_and_gradients(*inputs, self.temperature, features)
        return with_gradients(loss, inputs, grads)


@dataclass(frozen=True, kw_only=True)
class PatchReference(LossTerm):
    """``--loss.terms infonce=1 patch_reference=WEIGHT``: loss = 1/b sum_i 1/T sum_t (1 - cos(p_it,
    r_it)), over the T patches of an image, p the tower's, r its reference tower's
    (``--distill.reference``; ``start``: the tower as it was).

    A mean over images, so a weight means the same for any batch, ranks and micro-batches. With
    gradient caching a rank holds the patches of its part of the batch, 3 T H fp32 numbers an image.
    """

    name: ClassVar[str] = "patch_reference"
    needs_reference: ClassVar[bool] = True
    reads: ClassVar[Literal["patches"]] = "patches"
    # hidden state of the tower, as LLaVA's mm_vision_select_layer; -2: the block before the last
    layer: int = -2

    def __call__(self, features: Features) -> Tensor:
        patches_bTH = features.patches_bTH
        reference_bTH = features.reference_patches_bTH
        if patches_bTH is None or reference_bTH is None:
            raise ValueError(
                "loss term patch_reference has nothing to compare with: "
                "this step has no reference tower"
            )
        distance_bT = 1 - F.cosine_similarity(patches_bTH, reference_bTH, dim=-1)
        mask_bT = features.patch_mask(distance_bT.shape[1])
        if mask_bT is None:
            return distance_bT.mean()
        return ((distance_bT * mask_bT).sum(1) / mask_bT.sum(1)).mean()


TERM = [PatchCaptions, PatchReference]


def _logits(
    patch_RTD: Tensor,
    caption_ND: Tensor,
    scale: Tensor,
    temperature: float,
    mask_RT: Tensor | None,
) -> Tensor:
    """(R, N) l_ij of R images."""
    cosine_RNT = caption_ND @ patch_RTD.mT
    attention_RNT = cosine_RNT / temperature
    if mask_RT is not None:
        attention_RNT = attention_RNT + EXCLUDED * ~mask_RT[:, None]
    weight_RNT = attention_RNT.softmax(-1)
    product_RN = (weight_RNT * cosine_RNT).sum(-1)
    norm_RN = (weight_RNT @ patch_RTD).norm(dim=-1).clamp(min=1e-6)
    return scale * product_RN / norm_RN


def _loss_and_gradients(
    patch_bTD: Tensor,
    caption_bD: Tensor,
    scale: Tensor,
    temperature: float,
    features: Features,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """All logits of this rank's images, then the gradients of a block of images at a time."""
    ids_jb = stack_ids(features.caption_hashes, features.image_ids)
    group = features.group
    blocks = PairBlocks(caption_bD, caption_bD, ids_jb, features.block, group)
    # also holds v_ij
    blocks.block = features.block or max(1, blocks.block // sum(patch_bTD.shape[1:]))
    whole_bTD = patch_bTD.detach().float()
    others = [blocks.positive_ND.detach().float(), scale.detach().float()]
    mask_bT = features.patch_mask(patch_bTD.shape[1])
    rows_and_masks: list[tuple[slice, Tensor | None]] = []
    for rows in blocks:
        rows_and_masks.append((rows, None if mask_bT is None else mask_bT[rows]))
    shared = others[0], others[1], temperature
    logits_bN = torch.cat(
        [_logits(whole_bTD[rows], *shared, mask) for rows, mask in rows_and_masks]
    )
    every = slice(0, blocks.rows)
    if (excluded_bN := blocks.excluded(every)) is not None:
        logits_bN.masked_fill_(excluded_bN, EXCLUDED)
    row_b = logits_bN.logsumexp(1)
    column_N = gather_rows(logits_bN.logsumexp(0)[None], group).logsumexp(0)
    pair_b = blocks.diagonal(every, logits_bN)
    loss = 0.5 * (row_b + column_N[blocks.own_columns] - 2 * pair_b).mean()
    of_rows_bN = (logits_bN - row_b[:, None]).exp()
    of_columns_bN = (logits_bN - column_N).exp()
    slope_bN = (of_rows_bN + of_columns_bN) * (0.5 / blocks.rows)
    blocks.diagonal(every, slope_bN).sub_(1 / blocks.rows)
    patch_grads = []
    sums = [torch.zeros_like(x) for x in others]
    for rows, mask in rows_and_masks:
        leaves = [x.requires_grad_() for x in (whole_bTD[rows].clone(), *others)]
        with torch.enable_grad():
            logits_RN = _logits(leaves[0], leaves[1], leaves[2], temperature, mask)
        patch_grad, *parts = torch.autograd.grad(logits_RN, leaves, slope_bN[rows])
        patch_grads.append(patch_grad)
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)]
    return loss, (torch.cat(patch_grads), sum_own_rows(sums[0], group), sums[1])
