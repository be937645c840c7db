"""Caption retrieval accuracy (CRA): does a text encoder tell captions apart, without any image?

Two captions of each item; a query of one set ranks all captions of the other by cosine similarity, and the
best must be its partner (paper: two captions of each COCO-5K image, top-1).

Shape letters: N pairs of captions, W embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.evaluate.pairing import rank_both
from llm2clip_plugin.evaluate.retrieval_ranks import QueryRanks, TieRule


def caption_ranks(
    first_NW: Tensor, second_NW: Tensor, *, centre: bool = False, group_N: Tensor | None = None
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of first -> second and second -> first, for hits item by item.

    ``centre``: subtract each set's own mean before normalising. A raw LLM's embeddings share one large common
    direction; without it, much of the gain of fine-tuning is gone already, so report both.
    ``group_N``: int, pairs with the same label are partners of each other too (several items of one concept).
    """
    if first_NW.shape != second_NW.shape or first_NW.ndim != 2:
        raise ValueError(
            f"captions must be two (N, W) sets in pairs, got {tuple(first_NW.shape)}, {tuple(second_NW.shape)}"
        )
    label_N = torch.arange(len(first_NW), device=first_NW.device) if group_N is None else group_N
    first, second = (_unit(embedding_NW.float(), centre) for embedding_NW in (first_NW, second_NW))
    return rank_both(first, second, label_N, label_N)


def caption_retrieval_accuracy(
    first_NW: Tensor,
    second_NW: Tensor,
    *,
    centre: bool = False,
    group_N: Tensor | None = None,
    ties: TieRule = "half",
) -> dict[str, float]:
    """Top-1 as fractions: ``first_to_second``, ``second_to_first`` and their mean ``cra``; see `caption_ranks`."""
    there, back = caption_ranks(first_NW, second_NW, centre=centre, group_N=group_N)
    there_r1, back_r1 = (float(ranks.hits(1, ties).mean()) for ranks in (there, back))
    return {"first_to_second": there_r1, "second_to_first": back_r1, "cra": (there_r1 + back_r1) / 2}


def _unit(embedding_NW: Tensor, centre: bool) -> Tensor:
    """Rows of length one, after taking off the mean if asked."""
    if centre:
        embedding_NW = embedding_NW - embedding_NW.mean(0, keepdim=True)
    return F.normalize(embedding_NW, dim=1)
