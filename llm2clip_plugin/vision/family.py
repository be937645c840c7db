"""What the package needs to know of a family of vision towers, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

Tower: TypeAlias = Any  # a Hugging Face vision model (nn.Module); the fields of its `config` differ by family

# channel means and deviations of pixels in [0, 1], as the families were pretrained
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of towers. Dotted names are relative to the module that holds the blocks: transformers
    4.x wraps CLIP and SigLIP in ``vision_model``, 5.x does not; ``towers.core_of`` finds it."""

    name: str  # key in the registry and in the TowerCard
    model_types: tuple[str, ...]  # `model_type` in config.json, of a vision model and of a whole model
    vision_class: Callable[[], Any]  # the Hugging Face class; imported only when it is needed
    has_cls: bool  # a class token in front of the patches
    file_prefix: str = ""  # what the hub puts before the core's names in a file
    positions: str  # the position table, relative to the core; "" if the family has none
    blocks: str  # the ModuleList of transformer blocks
    embeddings: tuple[str, ...]  # modules and parameters below the first block
    final_norm: str  # the norm behind the last block
    last_state_is_normed: bool  # whether last_hidden_state has gone through final_norm
    pooling_head: str = ""  # module that only the pooled output uses (SigLIP's attention pool)
    never_trained: tuple[str, ...] = ()  # parameters that no forward pass of a tower reads
    mean: tuple[float, float, float] = OPENAI_MEAN  # preprocessor, where the source has none
    std: tuple[float, float, float] = OPENAI_STD
    needs: str = ""  # a requirement beyond the package's own, for the model card
    beside_tower: tuple[str, ...] = ()  # prefixes of a whole model's tensors that are not the tower's


def tower_in(model: Any) -> Tower:
    """The tower of a dual encoder, or the model itself if it is one."""
    return model.tower if "tower" in dict(model.named_children()) else model
