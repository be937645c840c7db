"""Centring and whitening: done to every embedding after pooling, fitted once on captions, kept beside the card.

Shape letters: N captions, W embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.contracts import ContractError, EncoderCard, sha256_weights

POST_FILE = "llm2clip_post.safetensors"
PostKind = Literal["none", "centre", "whiten"]
# added to every variance, as a share of their mean: directions in which captions hardly differ are not blown up
SHRINKAGE = 0.01


@dataclass(frozen=True)
class Post:
    """embedding -> (embedding - mean) @ matrix."""

    mean_W: Tensor
    matrix_WW: Tensor | None = None  # None: centring alone

    def __call__(self, embeddings_NW: Tensor) -> Tensor:
        """(N, W) float32 -> (N, W)."""
        centred_NW = embeddings_NW - self.mean_W
        return centred_NW if self.matrix_WW is None else centred_NW @ self.matrix_WW

    def save(self, folder: Path) -> str:
        """Write the file; returns its hash, for the card."""
        tensors = {"mean": self.mean_W} | ({} if self.matrix_WW is None else {"matrix": self.matrix_WW})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / POST_FILE))
        return sha256_weights(folder / POST_FILE)


def fit_post(embeddings_NW: Tensor, kind: PostKind) -> Post | None:
    """Mean and, to whiten, the symmetric matrix (ZCA) that gives the captions' embeddings equal variance every way.

    Raises ValueError for too few captions to estimate that.
    """
    if kind == "none":
        return None
    count, width = embeddings_NW.shape
    least = 2 * width if kind == "whiten" else 2
    if count < least:
        raise ValueError(f"{kind} needs {least} different captions at least, the data has {count}")
    mean_W = embeddings_NW.double().mean(dim=0)
    if kind == "centre":
        return Post(mean_W.float())
    variances_W, directions_WW = torch.linalg.eigh(torch.cov((embeddings_NW.double() - mean_W).T))
    scale_W = (variances_W.clamp_min(0) + SHRINKAGE * variances_W.mean()).rsqrt()
    return Post(mean_W.float(), (directions_WW * scale_W @ directions_WW.T).float())


def load_post(folder: Path, card: EncoderCard | None) -> Post | None:
    """What the card asks for; ContractError if the file is missing or not the card's."""
    if card is None or not card.post_sha256:
        return None
    path = folder / POST_FILE
    if not path.is_file():
        raise ContractError(f"{path} is missing: the card beside it asks for it; copy the whole folder")
    if (found := sha256_weights(path)) != card.post_sha256:
        raise ContractError(
            f"{path} has SHA-256 {found}, its card says {card.post_sha256}; copy the whole folder again"
        )
    tensors = load_file(path)
    return Post(tensors["mean"], tensors.get("matrix"))
