"""Image-text retrieval over embeddings: recall@k in both directions, with any number of captions per image.

Shapes: N images, M captions, D projection dimension, Q queries of one direction.

``i2t``: an image is the query and the captions are ranked, a hit if any correct caption is in the top k (other code
calls this text retrieval). ``t2i``: a caption is the query and the images are ranked (image retrieval).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.evaluate.config import KS
from llm2clip_plugin.evaluate.rank_counting import rank_both
from llm2clip_plugin.evaluate.retrieval_ranks import QueryRanks


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Ranks in both directions, and which images and captions were the queries."""

    i2t: QueryRanks
    t2i: QueryRanks
    image_index_Q: Tensor  # images that were queries: those with at least one correct caption in the pool
    caption_index_Q: Tensor  # captions that were queries, and the pool of i2t
    image_label_N: Tensor
    caption_label_Q: Tensor

    def metrics(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Mean hits, fractions 0 to 1: ``i2t_r1``, ``t2i_r1``, ``i2t_r5`` ..."""
        sides = {"i2t": self.i2t, "t2i": self.t2i}
        return {f"{side}_r{k}": float(ranks.hits(k).mean()) for k in ks for side, ranks in sides.items()}

    def chance(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Expected value of each of `metrics` for a random order."""
        image_label_Q = self.image_label_N[self.image_index_Q]
        sides = {"i2t": (image_label_Q, self.caption_label_Q), "t2i": (self.caption_label_Q, self.image_label_N)}
        return {f"{side}_r{k}": _chance(*labels, k) for k in ks for side, labels in sides.items()}


def recall(
    image_ND: Tensor,
    text_MD: Tensor,
    owner_M: Tensor,
    ks: Sequence[int] = KS,
    *,
    group_N: Tensor | None = None,
    all_ranks: bool = False,
) -> dict[str, float]:
    """Recall@k in both directions by cosine similarity, as fractions: ``i2t_r1``, ``t2i_r1`` ...; ties count half.

    ``image_ND``, ``text_MD``: embeddings, normalized here. ``owner_M``: int, the image of each caption; every image
    has at least one. ``group_N``: int, a label per image (several pictures of one concept): the captions of a group
    are correct for all of its images, and its images for all of its captions; None: every image is its own group.
    ``all_ranks``: see `rank_both`. Raises ValueError for an image without a caption, or non-finite embeddings.
    """
    label_N = torch.arange(len(image_ND)) if group_N is None else group_N.cpu()
    retrieval = retrieve(image_ND, text_MD, label_N, label_N[owner_M.cpu()], all_ranks=all_ranks)
    if missing := len(image_ND) - len(retrieval.image_index_Q):
        raise ValueError(f"{missing} of {len(image_ND)} images have no caption")
    return retrieval.metrics(ks)


def retrieve(
    image_ND: Tensor,
    text_MD: Tensor,
    image_label_N: Tensor,
    caption_label_M: Tensor,
    *,
    captions: Tensor | None = None,
    all_ranks: bool = False,
) -> Retrieval:
    """Rank in both directions; a caption is correct for an image if their labels (int) are equal.

    ``captions``: positions or a mask of the captions to use (one kind, one language); None: all. An image without a
    correct caption among them stays in the pool of t2i, but is not a query of i2t.
    """
    caption_index = torch.arange(len(text_MD))
    if captions is not None:
        caption_index = caption_index[captions.cpu()]
        text_MD = text_MD[caption_index.to(text_MD.device)]
    image_label_N, caption_label = image_label_N.cpu(), caption_label_M.cpu()[caption_index]
    image_ND, text_MD = F.normalize(image_ND.float(), dim=1), F.normalize(text_MD.float(), dim=1)
    i2t, t2i = rank_both(image_ND, text_MD, image_label_N, caption_label, all_ranks=all_ranks)
    image_index = torch.nonzero(i2t.correct_equal_Q).flatten()
    return Retrieval(
        i2t=i2t.select(image_index),
        t2i=t2i,
        image_index_Q=image_index,
        caption_index_Q=caption_index,
        image_label_N=image_label_N,
        caption_label_Q=caption_label,
    )


def shuffled(label_N: Tensor, seed: int = 0) -> Tensor:
    """(N,) labels for the control: every group of images gets the captions of another group.

    Recall under these labels must be at chance; any more does not come from the images.
    Raises ValueError for a single group.
    """
    label = torch.unique(label_N)
    if len(label) < 2:
        raise ValueError("--control needs images of at least two groups")
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(seed)).to(label.device)
    successor = torch.empty_like(label)
    successor[order] = label[order.roll(-1)]  # one cycle through all groups, so none keeps its own
    return successor[torch.searchsorted(label, label_N)]


def _chance(query_label_Q: Tensor, pool_label_I: Tensor, k: int) -> float:
    """Expected recall@k of a random order: 1 - C(I - p, k) / C(I, k), with p correct items among I."""
    label, size = torch.unique(pool_label_I, return_counts=True)
    correct_Q, pool = size[torch.searchsorted(label, query_label_Q)].double(), len(pool_label_I)
    miss_Q = torch.ones_like(correct_Q)
    for j in range(min(k, pool)):
        miss_Q *= (pool - correct_Q - j).clamp(min=0) / (pool - j)
    return float(1 - miss_Q.mean())
