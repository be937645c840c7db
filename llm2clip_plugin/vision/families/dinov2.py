"""DINOv2: class token, layer scale, positions of the pretraining grid (37 x 37 for the released models)."""

from __future__ import annotations

from llm2clip_plugin.vision.family import IMAGENET_MEAN, IMAGENET_STD, Family


def _vision_class() -> type:
    from transformers import Dinov2Model

    return Dinov2Model


FAMILY = Family(
    name="dinov2",
    model_types=("dinov2",),
    vision_class=_vision_class,
    has_cls=True,
    positions="embeddings.position_embeddings",
    blocks="encoder.layer",
    embeddings=("embeddings",),
    final_norm="layernorm",
    last_state_is_normed=True,
    never_trained=("embeddings.mask_token",),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    beside_tower=("classifier.",),
)
