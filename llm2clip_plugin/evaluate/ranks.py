"""How many candidates rank higher than the right one, in both directions, and recall@k of that.

Shapes: N images, M captions, D projection dimension, Q queries of one direction. ``i2t`` and
``t2i`` as in retrieval.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.evaluate.config import KS
from llm2clip_plugin.train.distributed import (
    Group,
    group_of,
    rank,
    sum_over_ranks,
    world_size,
)

BLOCK = 1 << 22  # scores computed at once: 16 MiB


@dataclass(frozen=True, kw_only=True)
class QueryRanks:
    """Three int64 counts per query that decide its hit at any k."""

    higher_Q: Tensor  # items that score strictly above the best correct item
    wrong_equal_Q: Tensor  # wrong items with exactly its score
    # correct items with exactly its score, itself included; 0 if the query has no correct item
    correct_equal_Q: Tensor

    def __len__(self) -> int:
        return len(self.higher_Q)

    def select(self, index: Tensor) -> QueryRanks:
        """The counts of some queries; ``index`` is a mask or positions."""
        return QueryRanks(
            **{name: count_Q[index] for name, count_Q in vars(self).items()}
        )

    def hits(self, k: int) -> Tensor:
        """(Q,) float64 in [0, 1]: is a correct item in the top ``k``? Equal scores are in random
        order.

        The hit is the probability that a correct item is in the top k: a tie with one wrong item
        counts one half, with n - 1 wrong ones 1 / n, so a tower that gives everything the same
        embedding gets chance. Raises ValueError for a query without a correct item.
        """
        if missing := int((self.correct_equal_Q == 0).sum()):
            raise ValueError(
                f"{missing} of {len(self)} queries have no correct item; exclude them with select()"
            )
        wrong_Q = self.wrong_equal_Q.double()
        correct_Q = self.correct_equal_Q.double()
        # probability that wrong items alone fill the s = k - higher places
        miss_Q = torch.ones_like(wrong_Q)
        # C(e, s) / C(e + r, s) = product over j < s of (e - j) / (e + r - j): e wrong, r correct
        for j in range(k):
            wrong_left_Q = (wrong_Q - j).clamp(min=0)
            left_Q = (wrong_Q + correct_Q - j).clamp(min=1)
            factor_Q = wrong_left_Q / left_Q
            miss_Q = torch.where(k - self.higher_Q > j, miss_Q * factor_Q, miss_Q)
        return 1.0 - miss_Q


def rank_both(
    first_ND: Tensor,
    second_MD: Tensor,
    first_label_N: Tensor,
    second_label_M: Tensor,
    *,
    all_ranks: bool = False,
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of each first row's best correct item among the second rows, and vice versa; on the
    CPU.

    The score is the dot product, on the embeddings' device, in fp32 whatever the input dtype,
    autocast and TF32; rows are correct for each other if their labels (int) are equal. A query
    without a correct item has ``correct_equal`` 0. ``all_ranks``: every rank of the default process
    group calls this with the same arrays and gets all results; the ranks split the blocks, which
    are the same for any number of ranks, and so are the results. Raises ValueError for embeddings
    that don't fit their labels, are none, or are not finite.
    """
    sides = [(first_ND, first_label_N), (second_MD, second_label_M)]
    for vectors, labels in sides:
        is_matrix = vectors.ndim == 2 and len(vectors) > 0
        if not is_matrix or labels.shape != vectors.shape[:1]:
            raise ValueError(
                f"expected (N, D) embeddings and (N,) labels, got {vectors.shape} and "
                f"{labels.shape}"
            )
        # no comparison with a NaN is true: it would be a hit
        if broken := int((~torch.isfinite(vectors.sum(1))).sum()):
            raise ValueError(f"{broken} of {len(vectors)} embeddings are not finite")
    group = group_of(all_ranks)
    first = (first_ND.float(), first_label_N.to(first_ND.device))
    second = (second_MD.float(), second_label_M.to(second_MD.device))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(first_ND.device.type, enabled=False):
            forward = _rank(*first, *second, group)
            return forward, _rank(*second, *first, group)
    finally:
        torch.set_float32_matmul_precision(before)


def _rank(
    query_QD: Tensor, label_Q: Tensor, item_ID: Tensor, label_I: Tensor, group: Group
) -> QueryRanks:
    """The ranks of one direction."""
    label_I, order_I = label_I.sort()  # a query's correct items are neighbors
    item_ID = item_ID[order_I]
    # identical items get one score, and tie exactly, whatever the matrix product does at its edges
    item_UD, distinct_I = torch.unique(item_ID, dim=0, return_inverse=True)
    if len(item_UD) == len(item_ID):
        item_UD = item_ID
        distinct_I = slice(None)
    first_Q = torch.searchsorted(label_I, label_Q)
    end_Q = torch.searchsorted(label_I, label_Q, right=True)
    counts_3Q = torch.zeros(3, len(query_QD), dtype=torch.int64, device=query_QD.device)
    step = max(1, BLOCK // len(item_ID))
    for start in range(rank(group) * step, len(query_QD), world_size(group) * step):
        some = slice(start, start + step)
        score_qI = (query_QD[some] @ item_UD.T)[:, distinct_I]
        first_q1 = first_Q[some, None]
        end_q1 = end_Q[some, None]
        most = max(1, int((end_q1 - first_q1).max()))  # correct items of a query
        item_qC = first_q1 + torch.arange(most, device=first_q1.device)
        is_correct_qC = item_qC < end_q1
        correct_qC = score_qI.gather(1, item_qC.clamp(max=len(item_ID) - 1))
        correct_qC = correct_qC.masked_fill(~is_correct_qC, -torch.inf)
        best_q1 = correct_qC.amax(1, keepdim=True)
        higher_q = (score_qI > best_q1).sum(1, dtype=torch.int32)
        equal_q = (score_qI == best_q1).sum(1, dtype=torch.int32)
        correct_equal_q = ((correct_qC == best_q1) & is_correct_qC).sum(1)
        counts_3Q[0, some] = higher_q
        counts_3Q[1, some] = equal_q - correct_equal_q
        counts_3Q[2, some] = correct_equal_q
    higher_Q, wrong_equal_Q, correct_equal_Q = sum_over_ranks(counts_3Q, group).cpu()
    return QueryRanks(
        higher_Q=higher_Q, wrong_equal_Q=wrong_equal_Q, correct_equal_Q=correct_equal_Q
    )


@dataclass(frozen=True)
class Retrieval:
    """Of each direction (i2t, t2i) the ranks and the positions of its queries, among the images or
    the captions.

    The queries of i2t are the images with a correct caption in the pool, those of t2i the captions
    in it.
    """

    sides: dict[str, tuple[QueryRanks, Tensor]]

    def metrics(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Mean hits, fractions 0 to 1: ``i2t_r1``, ``t2i_r1``, ``i2t_r5`` ..."""
        metrics: dict[str, float] = {}
        for k in ks:
            for side, (ranks, _) in self.sides.items():
                metrics[f"{side}_r{k}"] = float(ranks.hits(k).mean())
        return metrics


def recall(
    image_ND: Tensor,
    text_MD: Tensor,
    owner_M: Tensor,
    ks: Sequence[int] = KS,
    *,
    group_N: Tensor | None = None,
    all_ranks: bool = False,
) -> dict[str, float]:
    """Recall@k in both directions by cosine similarity, as fractions: ``i2t_r1``, ``t2i_r1`` ...;
    ties count half.

    ``image_ND``, ``text_MD``: embeddings, normalized here. ``owner_M``: int, the image of each
    caption; every image has at least one. ``group_N``: int, a label per image (several pictures of
    one concept): the captions of a group are correct for all of its images, and its images for all
    of its captions; None: every image is its own group. ``all_ranks``: see `rank_both`. Raises
    ValueError for an image without a caption, or non-finite embeddings.
    """
    label_N = torch.arange(len(image_ND)) if group_N is None else group_N.cpu()
    retrieval = retrieve(
        image_ND, text_MD, label_N, label_N[owner_M.cpu()], all_ranks=all_ranks
    )
    if missing := len(image_ND) - len(retrieval.sides["i2t"][0]):
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

    ``captions``: positions or a mask of the captions to use (one kind, one language); None: all. An
    image without a correct caption among them stays in the pool of t2i, but is not a query of i2t.
    """
    caption_index = torch.arange(len(text_MD))
    if captions is not None:
        caption_index = caption_index[captions.cpu()]
        text_MD = text_MD[caption_index.to(text_MD.device)]
    image_ND = F.normalize(image_ND.float(), dim=1)
    text_MD = F.normalize(text_MD.float(), dim=1)
    labels = image_label_N.cpu(), caption_label_M.cpu()[caption_index]
    i2t, t2i = rank_both(image_ND, text_MD, *labels, all_ranks=all_ranks)
    image_index = torch.nonzero(i2t.correct_equal_Q).flatten()
    return Retrieval(
        {"i2t": (i2t.select(image_index), image_index), "t2i": (t2i, caption_index)}
    )
