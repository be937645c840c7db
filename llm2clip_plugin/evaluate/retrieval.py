"""Image-text retrieval over embeddings: recall@k both ways, with any number of captions an image.

Shape letters: N images, M captions, D joint width, Q queries of one direction.

``i2t`` takes an image as the query and ranks the captions: a hit if any right caption is among the k best (other
code calls this text retrieval). ``t2i`` takes a caption as the query and ranks the images (image retrieval).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.evaluate.pairing import TILE, rank_both
from llm2clip_plugin.evaluate.retrieval_ranks import QueryRanks, TieRule

KS = (1, 5, 10)
UNIT = 1e-6  # what fp32 leaves of 1 after a division by the norm, at some thousand dimensions


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Ranks in both directions, and which images and captions were the queries."""

    i2t: QueryRanks
    t2i: QueryRanks
    image_index_Q: Tensor  # images that were queries: those with at least one right caption in the pool
    caption_index_Q: Tensor  # captions that were queries, and the pool of i2t
    image_label_N: Tensor
    caption_label_Q: Tensor

    def metrics(self, ks: Sequence[int] = KS, ties: TieRule = "half") -> dict[str, float]:
        """Mean hits, fractions 0 to 1: ``i2t_r1``, ``t2i_r1``, ``i2t_r5`` ..."""
        sides = {"i2t": self.i2t, "t2i": self.t2i}
        return {f"{side}_r{k}": float(ranks.hits(k, ties).mean()) for k in ks for side, ranks in sides.items()}

    def chance(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """What a random order would reach, under the keys of `metrics`."""
        image_label_Q = self.image_label_N[self.image_index_Q]
        sides = {"i2t": (image_label_Q, self.caption_label_Q), "t2i": (self.caption_label_Q, self.image_label_N)}
        return {f"{side}_r{k}": _chance(*labels, k) for k in ks for side, labels in sides.items()}


def recall(
    image_ND: Tensor,
    text_MD: Tensor,
    owner_M: Tensor,
    ks: Sequence[int] = KS,
    ties: TieRule = "half",
    *,
    group_N: Tensor | None = None,
    block: int = TILE,
    all_ranks: bool = False,
) -> dict[str, float]:
    """Recall@k both ways by cosine similarity, as fractions: ``i2t_r1``, ``t2i_r1`` ...

    ``image_ND``, ``text_MD``: embeddings, normalised here. ``owner_M``: int, the image of each caption;
    any number of captions an image, at least one. ``group_N``: int, one label an image: every caption of an
    image of the same group is right for it, and every image of the group is right for the caption
    (several pictures of one concept); without it an image is alone in its group.
    ``ties``: see `QueryRanks.hits`. ``block``: rows and columns of the scores held at once.
    ``all_ranks``: see `rank_both`.

    Raises ValueError for an image without a caption, an owner outside the images, non-finite embeddings.
    """
    label_N = torch.arange(len(image_ND)) if group_N is None else group_N.cpu()
    owner_M = owner_M.cpu()
    if len(owner_M) and (int(owner_M.min()) < 0 or int(owner_M.max()) >= len(image_ND)):
        raise ValueError(
            f"captions name images {int(owner_M.min())} to {int(owner_M.max())}, there are {len(image_ND)}"
        )
    found = retrieve(image_ND, text_MD, label_N, label_N[owner_M], block=block, all_ranks=all_ranks)
    if len(found.image_index_Q) < len(image_ND):
        lacking = sorted(set(range(len(image_ND))) - set(found.image_index_Q.tolist()))
        raise ValueError(f"{len(lacking)} of {len(image_ND)} images have no caption; the first is image {lacking[0]}")
    return found.metrics(ks, ties)


def retrieve(
    image_ND: Tensor,
    text_MD: Tensor,
    image_label_N: Tensor,
    caption_label_M: Tensor,
    *,
    captions: Tensor | None = None,
    block: int = TILE,
    all_ranks: bool = False,
) -> Retrieval:
    """Rank in both directions; a caption and an image belong together when their labels (int) are equal.

    ``captions``: positions or a mask of the captions that count (one kind, one language); all without it.
    An image that has no right caption among them stays in the pool of t2i, but is no query of i2t.
    """
    image_label_N, caption_label_M = image_label_N.cpu(), caption_label_M.cpu()
    caption_index = torch.arange(len(text_MD))
    if captions is not None:
        caption_index = caption_index[captions.cpu()]
    chosen_MD = text_MD if captions is None else text_MD[caption_index.to(text_MD.device)]
    image, text = unit_rows(image_ND), unit_rows(chosen_MD)
    caption_label = caption_label_M[caption_index]
    i2t, t2i = rank_both(image, text, image_label_N, caption_label, tile=block, all_ranks=all_ranks)
    image_index = torch.nonzero(i2t.right_equal_Q).flatten()
    return Retrieval(
        i2t=i2t.select(image_index),
        t2i=t2i,
        image_index_Q=image_index,
        caption_index_Q=caption_index,
        image_label_N=image_label_N,
        caption_label_Q=caption_label,
    )


def unit_rows(vectors_ND: Tensor) -> Tensor:
    """Rows of length 1 in fp32; the same tensor, without a copy, if they are so to fp32's precision."""
    vectors_ND = vectors_ND.float()
    away = (torch.linalg.vector_norm(vectors_ND, dim=1) - 1).abs()
    return vectors_ND if bool((away <= UNIT).all()) else F.normalize(vectors_ND, dim=1)


def shuffled(label_N: Tensor, seed: int = 0) -> Tensor:
    """(N,) labels for the control: every group of images gets the captions of another group.

    Recall of the images under these labels must be at chance; what is above it does not come from the images.
    """
    label = torch.unique(label_N)
    if len(label) < 2:
        raise ValueError("the shuffled control needs images of at least two groups")
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed)).to(label.device)
    following = torch.empty_like(label)
    following[order] = label[order.roll(-1)]  # one cycle through all groups, so none keeps its own
    return following[torch.searchsorted(label, label_N)]


def _chance(query_label_Q: Tensor, pool_label_I: Tensor, k: int) -> float:
    """Expected recall@k of a random order: 1 - C(I - p, k) / C(I, k), with p right items among I."""
    label, size = torch.unique(pool_label_I, return_counts=True)
    right_Q, pool = size[torch.searchsorted(label, query_label_Q)].double(), len(pool_label_I)
    miss_Q = torch.ones_like(right_Q)
    for j in range(min(k, pool)):
        miss_Q *= (pool - right_Q - j).clamp(min=0) / (pool - j)
    return float(1 - miss_Q.mean())
