"""Centering and removed components of embeddings after pooling, fitted on captions and saved as a
file.

Shape letters: N captions, W embedding width, K removed directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.atomic import atomic_file
from llm2clip_plugin.contracts import POST_FILE, EncoderCard
from llm2clip_plugin.errors import ContractError, errors_about
from llm2clip_plugin.hashes import sha256_weights


@dataclass(frozen=True)
class Post:
    """embedding -> embedding - mean, without its part along the removed directions."""

    mean: Tensor  # (W,)
    removed: Tensor | None = None  # (W, K), orthonormal columns

    def __call__(self, embeddings_NW: Tensor) -> Tensor:
        """(N, W) float32 -> (N, W)."""
        centered_NW = embeddings_NW - self.mean
        if self.removed is None:
            return centered_NW
        return centered_NW - centered_NW @ self.removed @ self.removed.T

    def save(self, folder: Path) -> str:
        """Write POST_FILE into ``folder``; returns its hash, which the card records."""
        tensors = {"mean": self.mean.contiguous()}
        if self.removed is not None:
            tensors["removed"] = self.removed.contiguous()
        with atomic_file(folder / POST_FILE) as temporary:
            save_file(tensors, str(temporary))
        return sha256_weights(folder / POST_FILE)


def open_post(path: Path, width: int, sha256: str = "") -> tuple[Post, str]:
    """A saved file for embeddings ``width`` wide, and its hash.

    Raises FileNotFoundError, or ContractError for another width or another hash than ``sha256``.
    """
    # `llm2clip evaluate captions --search` writes it
    with errors_about(path, fix="write it again"):
        post = Post(**load_file(path))
    if len(post.mean) != width:
        raise ContractError(
            f"{path} is for embeddings of width {len(post.mean)}, but the LLM's have {width}"
        )
    actual = sha256_weights(path)
    if sha256 not in ("", actual):
        raise ContractError(
            f"{path} has SHA-256 {actual}, {EncoderCard.FILE} has {sha256}; copy the folder again"
        )
    return post, actual


def remove_components(embeddings_NW: Tensor, counts: Sequence[int]) -> list[Post]:
    """Centering, then without the ``count`` largest principal components of (N, W), for each of
    ``counts``.

    All-but-the-top (Mu & Viswanath 2018, arXiv 1702.01417). Raises ValueError if there are too few
    captions or directions for a count.
    """
    captions, width = embeddings_NW.shape
    if not 0 <= max(counts) < min(captions, width):
        raise ValueError(
            f"cannot remove {max(counts)} components of {width}, fitted on {captions} captions"
        )
    mean_W = embeddings_NW.double().mean(dim=0)
    # ascending
    _, directions_WW = torch.linalg.eigh(torch.cov((embeddings_NW.double() - mean_W).T))
    removed = [
        directions_WW[:, width - count :].float() if count else None for count in counts
    ]
    return [Post(mean_W.float(), removed_WK) for removed_WK in removed]
