"""SigLIP and SigLIP2 at a fixed resolution (both are ``siglip`` on the hub): no class token, attention pooling."""

from __future__ import annotations

from llm2clip_plugin.vision.family import HALF_MEAN, HALF_STD, Family


def _vision_class() -> type:
    from transformers import SiglipVisionModel

    return SiglipVisionModel


FAMILY = Family(
    name="siglip",
    model_types=("siglip_vision_model", "siglip"),
    vision_class=_vision_class,
    has_cls=False,
    file_prefix="vision_model.",
    positions="embeddings.position_embedding.weight",
    blocks="encoder.layers",
    embeddings=("embeddings",),
    final_norm="post_layernorm",
    last_state_is_normed=True,
    pooling_head="head",
    mean=HALF_MEAN,
    std=HALF_STD,
    beside_tower=("text_model.", "text_adapter.", "visual_projection.", "logit_scale", "logit_bias"),
)
