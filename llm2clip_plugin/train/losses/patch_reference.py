"""Patches stay where a reference has them: what an MLLM reads of the tower, which no other term holds."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from llm2clip_plugin.train.losses.base import Features, LossTerm


@dataclass(frozen=True, kw_only=True)
class PatchReference(LossTerm):
    """``--loss.terms infonce=1 patch_reference=WEIGHT``: loss = 1/(b T) sum_it (1 - cos(p_it, r_it)), over the patches
    of all images, p the tower's, r those of its frozen tower (``--distill.reference``; ``start``: the tower as it was).

    A mean over images, so a weight means the same for any batch, ranks and micro-batches. With gradient caching a rank
    holds the patches of its part of the batch, 3 T H fp32 numbers an image.
    """

    name: ClassVar[str] = "patch_reference"
    needs_reference: ClassVar[bool] = True
    reads: ClassVar[Literal["patches"]] = "patches"
    layer: int = -2  # hidden state of the tower, as LLaVA's mm_vision_select_layer; -2: the block before the last

    def __call__(self, features: Features) -> Tensor:
        patches_bTH, reference_bTH = features.patches_bTH, features.reference_patches_bTH
        if patches_bTH is None or reference_bTH is None:
            raise ValueError("loss term patch_reference has nothing to compare with: this step has no frozen tower")
        return (1 - F.cosine_similarity(patches_bTH, reference_bTH, dim=-1)).mean()


TERM = PatchReference
