"""Centering, whitening and removed components of embeddings after pooling, fitted on captions and saved as a file.

Shape letters: N captions, W embedding width, K removed components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip_plugin.contracts import ContractError, EncoderCard, sha256_weights
from llm2clip_plugin.data.sources.base import SourceConfig
from llm2clip_plugin.data.sources.open import open_source
from llm2clip_plugin.outside.values import errors_about
from llm2clip_plugin.text.config import PostKind

POST_FILE = "llm2clip_post.safetensors"
# fraction of the mean variance that is added to every variance, so that nearly constant directions are not blown up
SHRINKAGE = 0.01


@dataclass(frozen=True)
class Post:
    """embedding -> (embedding - mean) @ matrix, or without its part along the removed directions."""

    mean_W: Tensor
    matrix_WW: Tensor | None = None  # None: only centering
    removed_WK: Tensor | None = None  # orthonormal columns

    def __call__(self, embeddings_NW: Tensor) -> Tensor:
        """(N, W) float32 -> (N, W)."""
        centered_NW = embeddings_NW - self.mean_W
        if self.removed_WK is not None:
            centered_NW = centered_NW - centered_NW @ self.removed_WK @ self.removed_WK.T
        return centered_NW if self.matrix_WW is None else centered_NW @ self.matrix_WW

    def save(self, folder: Path) -> str:
        """Write POST_FILE into ``folder``; returns its hash, which the card records."""
        tensors = {"mean": self.mean_W, "matrix": self.matrix_WW, "removed": self.removed_WK}
        present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(present, str(folder / POST_FILE))
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


def remove_components(embeddings_NW: Tensor, counts: Sequence[int]) -> list[Post]:
    """Centering, then without the ``count`` largest principal components of (N, W), for each of ``counts``.

    All-but-the-top (Mu & Viswanath 2018, arXiv 1702.01417). Raises ValueError if there are too few captions or
    directions for a count.
    """
    captions, width = embeddings_NW.shape
    if not 0 <= max(counts) < min(captions, width):
        raise ValueError(
            f"cannot remove {max(counts)} components, fitted on {captions} captions, of a width of {width}"
        )
    mean_W = embeddings_NW.double().mean(dim=0)
    _, directions_WW = torch.linalg.eigh(torch.cov((embeddings_NW.double() - mean_W).T))  # ascending
    removed = [directions_WW[:, width - count :].float() if count else None for count in counts]
    return [Post(mean_W.float(), removed_WK=removed_WK) for removed_WK in removed]


def first_captions(data: str, limit: int) -> list[str]:
    """The first ``limit`` distinct captions of a data set, of any kind and language."""
    source, texts = open_source(SourceConfig(path=data)), dict[str, None]()
    for number in range(len(source)):
        texts |= dict.fromkeys(caption.text for caption in source.captions(number)[1])
        if len(texts) >= limit:
            break
    return list(texts)[:limit]


def open_post(path: Path, width: int) -> tuple[Post, str]:
    """A saved file for embeddings ``width`` wide, and its hash. Raises FileNotFoundError, or ContractError."""
    if not path.is_file():
        raise FileNotFoundError(f"no post-processing at {path}; `llm2clip evaluate captions --search` writes one")
    post, sha256 = _read(path), sha256_weights(path)
    if len(post.mean_W) != width:
        raise ContractError(f"{path} is for embeddings of width {len(post.mean_W)}, but the LLM's have {width}")
    return post, sha256


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
    return _read(path)


def _read(path: Path) -> Post:
    with errors_about(path, fix="write it again"):
        tensors = load_file(path)
        return Post(tensors["mean"], tensors.get("matrix"), tensors.get("removed"))
