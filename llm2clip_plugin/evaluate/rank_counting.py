"""Exact ranks in both directions, a block of queries at a time: scores are compared with the best correct item's.

Shapes: N and M rows of the two sides, Q queries, I items, U distinct items, D width, q queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llm2clip_plugin.evaluate.retrieval_ranks import QueryRanks
from llm2clip_plugin.train.distributed import Group, group_of, rank, sum_over_ranks, world_size

BLOCK = 1 << 24  # scores computed at once: 64 MiB


def rank_both(
    first_ND: Tensor, second_MD: Tensor, first_label_N: Tensor, second_label_M: Tensor, *, all_ranks: bool = False
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of each first row's best correct item among the second rows, and vice versa; on the CPU.

    The score is the dot product, on the embeddings' device, in fp32 whatever the input dtype, autocast and TF32; rows
    are correct for each other if their labels (int) are equal. A query without a correct item has ``correct_equal`` 0.
    ``all_ranks``: every rank of the default process group calls this with the same arrays and gets all results; the
    ranks split the blocks, which are the same for any number of ranks, and so are the results.
    Raises ValueError for mismatched shapes, empty input, or non-finite embeddings.
    """
    sides = [(first_ND, first_label_N), (second_MD, second_label_M)]
    for vectors, labels in sides:
        if vectors.ndim != 2 or not len(vectors) or labels.shape != vectors.shape[:1]:
            raise ValueError(f"expected (N, D) embeddings and (N,) labels, got {vectors.shape} and {labels.shape}")
        # no comparison with a NaN is true: it would be a hit
        if broken := int((~torch.isfinite(vectors.sum(1))).sum()):
            raise ValueError(f"{broken} of {len(vectors)} embeddings are not finite")
    if first_ND.shape[1] != second_MD.shape[1]:
        raise ValueError(f"embeddings have different widths: {first_ND.shape[1]} and {second_MD.shape[1]}")
    group = group_of(all_ranks)
    first, second = ((vectors.float(), labels.to(vectors.device)) for vectors, labels in sides)
    with torch.no_grad(), full_precision(first_ND.device):
        return _rank(*first, *second, group), _rank(*second, *first, group)


def _rank(query_QD: Tensor, label_Q: Tensor, item_ID: Tensor, label_I: Tensor, group: Group) -> QueryRanks:
    """The ranks of one direction."""
    # identical items get one score, and tie exactly, whatever the matrix product does at its edges
    item_UD, distinct_I = torch.unique(item_ID, dim=0, return_inverse=True)
    counts_3Q = torch.zeros(3, len(query_QD), dtype=torch.int64, device=query_QD.device)
    step = max(1, BLOCK // len(item_ID))
    for start in range(rank(group) * step, len(query_QD), world_size(group) * step):
        some = slice(start, start + step)
        score_qI = (query_QD[some] @ item_UD.T)[:, distinct_I]
        correct_qI = label_Q[some, None] == label_I
        best_q1 = score_qI.masked_fill(~correct_qI, -torch.inf).amax(1, keepdim=True)
        equal_qI = score_qI == best_q1
        counts_3Q[0, some] = (score_qI > best_q1).sum(1, dtype=torch.int32)
        counts_3Q[1, some] = (equal_qI & ~correct_qI).sum(1, dtype=torch.int32)
        counts_3Q[2, some] = (equal_qI & correct_qI).sum(1, dtype=torch.int32)
    higher_Q, wrong_equal_Q, correct_equal_Q = sum_over_ranks(counts_3Q, group).cpu()
    return QueryRanks(higher_Q=higher_Q, wrong_equal_Q=wrong_equal_Q, correct_equal_Q=correct_equal_Q)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute fp32 matrix products in fp32, without autocast, TF32 or bf16 passes, whatever the caller's settings."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
