"""The text adapter learns a CLIP's own text space from captions alone: an LLM's embeddings in, the CLIP's features out.

Shape letters: m captions of a micro-batch, N captions, W width of an LLM embedding, D width of the CLIP's features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip_plugin.train.step import Batch, ContrastiveStep, Encoded
from llm2clip_plugin.vision.adapter import TextAdapter

LOG_SCALE = 4.6052  # ln 100, CLIP's; for terms that compare captions with each other


class InheritedSpace(nn.Module):
    """A text adapter whose output is normalized."""

    def __init__(self, text_adapter: TextAdapter) -> None:
        super().__init__()
        self.text_adapter = text_adapter

    def forward(self, embeddings: Tensor) -> Tensor:
        """(m, W) -> (m, D), L2-normalized, float32."""
        return F.normalize(self.text_adapter(embeddings).float(), dim=-1)


class InheritStep(ContrastiveStep):
    """A step over captions: ``batch["embeddings"]`` (b, W) of the LLM, ``batch["targets"]`` (b, D) of the CLIP.

    The terms of the loss see the adapter's output as anchors, and the CLIP's features as their captions and as their
    reference.
    """

    def _on_device(self, batch: Batch) -> Batch:
        device = self.engine.device
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _rows(self, batch: Batch, rows: slice) -> Batch:
        return {name: batch[name][rows] for name in ("embeddings", "targets")}

    def _forward(self, micro: Batch) -> Encoded:
        feature_mD = self.engine(micro["embeddings"])
        constant = torch.full((1,), LOG_SCALE, device=feature_mD.device)
        return Encoded(feature_mD, self._reference(micro)[0][:, None], constant, torch.zeros_like(constant))

    def _reference(self, micro: Batch) -> tuple[Tensor, None]:
        return F.normalize(micro["targets"].float(), dim=-1), None


def scores(feature_ND: Tensor, target_ND: Tensor) -> dict[str, float]:
    """How near two spaces are, of N distinct captions, L2-normalized in both.

    ``cosine``: mean cosine of a caption's two features. ``structure``: correlation of the cosines between captions in
    one space with those in the other. ``caption_r1``: fraction of captions whose nearest target is their own.
    """
    i, j = torch.triu_indices(len(feature_ND), len(feature_ND), 1, device=feature_ND.device)
    own, theirs = (x_ND @ x_ND.T for x_ND in (feature_ND, target_ND))
    correlation = torch.corrcoef(torch.stack([own[i, j], theirs[i, j]]))[0, 1]
    nearest_N = (feature_ND @ target_ND.T).argmax(1)
    return {
        "cosine": float((feature_ND * target_ND).sum(1).mean()),
        "structure": float(correlation),
        "caption_r1": float((nearest_N == torch.arange(len(nearest_N), device=nearest_N.device)).float().mean()),
    }
