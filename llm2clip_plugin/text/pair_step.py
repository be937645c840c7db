"""Step and loss of stage 1. The step is the tower's; both sides of a pair are texts.

Shape letters: b this rank's pairs, m pairs of a micro-batch, N pairs over all ranks, R texts of a
micro-batch, W embedding width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.text.config import ContrastConfig
from llm2clip_plugin.text.encoder import CaptionEncoder
from llm2clip_plugin.text.pair_module import equal_parts
from llm2clip_plugin.train.distributed import gather_rows, rank, world_size
from llm2clip_plugin.train.engine import Engine
from llm2clip_plugin.train.losses.base import EXCLUDED, Features, Terms, stack_ids
from llm2clip_plugin.train.losses.infonce import contrastive_loss
from llm2clip_plugin.train.step import Batch, ContrastiveStep, Encoded


class CaptionStep(ContrastiveStep):
    """A step of the LLM: ``batch["tokens"]`` holds this rank's b pairs (see PairTokenizer).
    The positives' features are (m, 1, W), or (m, 2, W) with the hard negatives second."""

    def __init__(
        self,
        engine: Engine,
        terms: Terms,
        encoder: CaptionEncoder,
        config: ContrastConfig,
        *,
        seed: int,
    ) -> None:
        super().__init__(engine, terms, seed=seed)
        self.encoder = encoder
        self.config = config

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the module's device, longest pairs first: a micro-batch of like lengths has
        less padding."""
        sides = [
            rows for side, rows in batch["tokens"].items() if side != "query_frame"
        ]

        def length(row: int) -> int:
            return sum(len(side[row]) for side in sides)

        order = sorted(range(len(batch["keys"])), key=lambda row: -length(row))
        tokens: dict[str, list[Any]] = {}
        for side, rows in batch["tokens"].items():
            tokens[side] = [rows[row] for row in order]
        device = self.engine.device
        return {
            **batch,
            "keys": [batch["keys"][row] for row in order],
            "tokens": tokens,
            "caption_hashes": batch["caption_hashes"][..., order].to(device),
            "image_ids": batch["image_ids"][..., order].to(device),
        }

    def _rows(self, batch: Batch, rows: slice) -> Batch:
        return {"tokens": {side: ids[rows] for side, ids in batch["tokens"].items()}}

    def _forward(self, micro: Batch) -> Encoded:
        queries: list[list[int]] = micro["tokens"]["query"]
        targets: list[list[int]] = list(micro["tokens"]["positive"])
        targets += micro["tokens"].get("negative", ())
        frames = [*micro["tokens"]["query_frame"], *[self.encoder.frame] * len(targets)]
        rows = [*queries, *targets]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        tensors: list[Tensor] = []
        for part in equal_parts(order, self.config.length_groups):
            rows_of_part = [rows[index] for index in part]
            frames_of_part = [frames[index] for index in part]
            group = self.encoder.collate(rows_of_part, frames_of_part)
            tensors += vars(group).values()
        # before the forward pass: a copy waits for what the GPU has begun
        sorted_index_R = torch.tensor(order).argsort().to(self.encoder.device)
        sorted_RW, log_scale = self.engine(*tensors)
        features_RW = sorted_RW[sorted_index_R]
        size = len(queries)
        query_mW = features_RW[:size]
        positive_mkW = features_RW[size:].unflatten(0, (-1, size)).transpose(0, 1)
        return Encoded(query_mW, positive_mkW, log_scale, torch.zeros_like(log_scale))


def caption_terms(config: ContrastConfig) -> Terms:
    """The loss: InfoNCE, with hard negatives if the batch has them."""

    def infonce(x: Features) -> Tensor:
        ids: dict[str, Any] = {}
        if config.mask_same:
            ids = {"caption_hashes": x.caption_hashes, "image_ids": x.image_ids}
        positive_bW = x.positive_bkD[:, 0]
        scale = x.log_scale.exp()
        if config.symmetric and x.positive_bkD.shape[1] == 1:
            return contrastive_loss(x.anchor_bD, positive_bW, scale, **ids)
        negative_nW = x.positive_bkD[:, 1:].flatten(0, 1)
        return pair_loss(
            x.anchor_bD,
            positive_bW,
            negative_nW,
            scale,
            symmetric=config.symmetric,
            **ids,
        )

    return {"infonce": infonce}


def pair_loss(
    query_bW: Tensor,
    positive_bW: Tensor,
    negative_nW: Tensor,
    scale: Tensor,
    *,
    symmetric: bool = True,
    caption_hashes: Tensor | None = None,
    image_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE of pairs of texts, in which the hard negatives of all N pairs are negatives of each
    query.

    there_i = log(sum_j e^(s q_i.p_j) + sum_j e^(s q_i.n_j)) - s q_i.p_i
    back_i  = log sum_j e^(s p_i.q_j) - s p_i.q_i
    loss_r  = 1/b sum_i there_i, or with ``symmetric`` 1/(2b) sum_i (there_i + back_i);
    i over this rank's pairs, j over all ranks'. One-directional: supervised SimCSE (Gao et al.
    2021, arXiv 2104.08821) as LLM2Vec and LLM2CLIP train with; both: E5 (Wang et al. 2022).

    query, positive: (b, W) of length 1; negative: (n, W), n a multiple of b or 0; scale: (1,); ids
    as in ``contrastive_loss``: pairs that share one are excluded from the sums over positives. The
    mean over ranks is the loss of the whole batch, in its gradient, too. Not for batches whose (b,
    3 N) logits are too large to hold.
    """
    b = len(query_bW)
    first = rank() * len(query_bW)
    s = scale.float()
    there_bM = s * query_bW.float() @ gather_with_gradient(positive_bW).float().T
    target_b = torch.arange(first, first + b, device=query_bW.device)
    ids_kb = stack_ids(caption_hashes, image_ids)
    excluded_bN = None
    if ids_kb is not None:
        ids_kN = gather_rows(ids_kb.T.contiguous()).T
        same_kkbN = ids_kb[:, None, :, None] == ids_kN[:, None]
        excluded_bN = same_kkbN.flatten(0, 1).any(0)
        excluded_bN.diagonal(first)[:b].fill_(False)
        there_bM = there_bM.masked_fill(excluded_bN, EXCLUDED)
    if len(negative_nW):
        all_negative_W = gather_with_gradient(negative_nW).float()
        there_bM = torch.cat([there_bM, s * query_bW.float() @ all_negative_W.T], dim=1)
    there = F.cross_entropy(there_bM, target_b)
    if not symmetric:
        return there
    back_bN = s * positive_bW.float() @ gather_with_gradient(query_bW).float().T
    if excluded_bN is not None:
        back_bN = back_bN.masked_fill(excluded_bN, EXCLUDED)
    return 0.5 * (there + F.cross_entropy(back_bN, target_b))


def gather_with_gradient(local: Tensor) -> Tensor:
    """(b, W) on each rank -> (N, W), differentiable with respect to every rank's rows."""
    if world_size() == 1:
        return local
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(local.contiguous()))
