"""The module of stage 1: an LLM that embeds groups of texts, and the logit scale.

Shape letters: R texts of a micro-batch, G texts of one length group, W embedding width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.text.config import ContrastConfig
from llm2clip_plugin.text.llm import CaptionModel, TokenBatch


class PairModule(nn.Module):
    """An LLM's pooled embeddings of several groups of texts, and the logit scale."""

    def __init__(self, model: CaptionModel, config: ContrastConfig) -> None:
        super().__init__()
        self.model = model
        # shape (1,): DeepSpeed does not support 0-d parameters
        log_scale = torch.tensor([math.log(config.scale)])
        self.logit_scale = nn.Parameter(log_scale, requires_grad=config.learn_scale)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Token batches of G texts each, four tensors a batch -> (R, W) embeddings of length 1, log
        scale (1,)."""
        embeddings: list[Tensor] = []
        for start in range(0, len(tensors), 4):
            group = TokenBatch(*tensors[start : start + 4])
            embeddings.append(self.model(group))
        embeddings_RW = torch.cat(embeddings)
        return F.normalize(embeddings_RW, dim=1), self.logit_scale.float() * 1


def equal_parts(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Split ``items`` into at most ``parts`` contiguous parts of like length. Their number follows
    from that of the items alone: all ranks call the module equally often, as ZeRO-3 requires."""
    size = -(-len(items) // parts)  # rounded up
    return [items[start : start + size] for start in range(0, len(items), size)]
