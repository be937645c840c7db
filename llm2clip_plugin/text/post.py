"""Centering and whitening of embeddings after pooling, fitted on captions and saved in the folder of the card.

Shape letters: N captions, W embedding width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.contracts import ContractError, EncoderCard, sha256_weights
from llm2clip_plugin.text.config import PostKind

POST_FILE = "llm2clip_post.safetensors"
# fraction of the mean variance that is added to every variance, so that nearly constant directions are not blown up
SHRINKAGE = 0.01


@dataclass(frozen=True)
class Post:
    """embedding -> (embedding - mean) @ matrix."""

    mean_W: Tensor
    matrix_WW: Tensor | None = None  # None: only centering

    def __call__(self, embeddings_NW: Tensor) -> Tensor:
        """(N, W) float32 -> (N, W)."""
        centered_NW = embeddings_NW - self.mean_W
        return centered_NW if self.matrix_WW is None else centered_NW @ self.matrix_WW

    def save(self, folder: Path) -> str:
        """Write POST_FILE into ``folder``; returns its hash, which the card records."""
        tensors = {"mean": self.mean_W} | ({} if self.matrix_WW is None else {"matrix": self.matrix_WW})
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / POST_FILE))
        return sha256_weights(folder / POST_FILE)


def fit_post(embeddings_NW: Tensor, kind: PostKind) -> Post | None:
    """The mean and, to whiten, the symmetric matrix (ZCA) that gives (N, W) embeddings equal variance everywhere.

    None for kind "none". Raises ValueError for too few captions: whitening needs 2 W.
    """
    if kind == "none":
        return None
    count, width = embeddings_NW.shape
    least = 2 * width if kind == "whiten" else 2
    if count < least:
        raise ValueError(f"{kind} needs at least {least} distinct captions, but the data has {count}")
    mean_W = embeddings_NW.double().mean(dim=0)
    if kind == "centre":
        return Post(mean_W.float())
    variances_W, directions_WW = torch.linalg.eigh(torch.cov((embeddings_NW.double() - mean_W).T))
    scale_W = (variances_W.clamp_min(0) + SHRINKAGE * variances_W.mean()).rsqrt()
    return Post(mean_W.float(), (directions_WW * scale_W @ directions_WW.T).float())


def load_post(folder: Path, card: EncoderCard | None) -> Post | None:
    """The centering or whitening that the card names; raises ContractError if its file is missing or another one."""
    if card is None or not card.post_sha256:
        return None
    path = folder / POST_FILE
    if not path.is_file():
        raise ContractError(f"{path} is missing, but {EncoderCard.FILE} refers to it; copy the complete folder")
    if (actual := sha256_weights(path)) != card.post_sha256:
        raise ContractError(
            f"{path} has SHA-256 {actual}, but {EncoderCard.FILE} records {card.post_sha256}; copy the folder again"
        )
    tensors = load_file(path)
    return Post(tensors["mean"], tensors.get("matrix"))
