"""What a loss term gets and what it is.

Shape letters: b this rank's pairs, k texts that belong to an anchor, D width of the features, T patches of an image, H
width of the tower.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from llm2clip_plugin.train.distributed import Group


@dataclass(frozen=True, kw_only=True)
class Features:
    """This rank's rows of a batch, as the terms of a loss see them."""

    anchor_bD: Tensor  # L2-normalized: images (stage 2) or queries (stage 1)
    positive_bkD: Tensor  # L2-normalized: the k captions of an image; in stage 1 the positive, then a hard negative
    log_scale: Tensor  # (1,) natural logarithm of the logits' factor
    bias: Tensor  # (1,) of the logits; 0 where the model learns none
    caption_hashes: Tensor | None  # (b,) or (j, b) int64: pairs that share one are not negatives of each other
    image_ids: Tensor | None  # (b,) int64, likewise
    reference_bD: Tensor | None = None  # L2-normalized, no gradient: of the frozen twin; None if the run has none
    patches_bTH: Tensor | None = None  # of the tower's hidden state ``layer``, float32; None if no term reads them
    reference_patches_bTH: Tensor | None = None  # the frozen twin's, no gradient
    patch_features_bTD: Tensor | None = None  # patches in the space of the anchors, L2-normalized; None likewise
    progress: float = 1.0  # fraction of the run's steps that are done
    block: int = 0  # rows of the logits held at once; 0 chooses by device
    group: Group = None  # the ranks that hold the batch, b rows on each

    @property
    def of_batch(self) -> dict[str, Any]:
        """The keyword arguments that contrastive_loss and sigmoid_loss have in common."""
        return {
            "caption_hashes": self.caption_hashes,
            "image_ids": self.image_ids,
            "block": self.block,
            "group": self.group,
        }


@dataclass(frozen=True, kw_only=True)
class LossTerm(ABC):
    """One loss. Subclasses are frozen dataclasses; their fields are the term's own settings, with defaults, which
    ``--loss.args NAME=VALUE`` sets."""

    name: ClassVar[str]  # of ``--loss.terms``
    uses_bias: ClassVar[bool] = False  # the learned bias of the logits
    needs_reference: ClassVar[bool] = False  # Features.reference_bD
    uses_all_captions: ClassVar[bool] = False  # of Features.positive_bkD, not the first alone
    # "patches" or "patch_features" of Features, of the hidden state that the term's own field ``layer`` names
    reads: ClassVar[Literal["", "patches", "patch_features"]] = ""

    @abstractmethod
    def __call__(self, features: Features) -> Tensor:
        """This rank's loss, a scalar whose mean over ranks is the loss of the whole batch.

        Its gradient with respect to the features is that of the sum over ranks; the engine averages over ranks.
        """
