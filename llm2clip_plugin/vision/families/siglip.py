"""SigLIP and SigLIP2 at a fixed resolution (both ``siglip`` on the Hub): no class token, attention
pooling."""

from typing import Any

from llm2clip_plugin.vision.families import (
    BASE,
    HALF_MEAN,
    HALF_STD,
    Family,
    in_module,
    in_transformers,
)

B = {**BASE, "intermediate_size": 3072, "patch_size": 16}
SO400M = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
}


def _vision_class() -> Any:
    """transformers' class; in version 4, one that can do without the pooling head."""
    import transformers

    if int(transformers.__version__.split(".")[0]) >= 5:
        return transformers.SiglipVisionModel
    return in_module("llm2clip_plugin.vision.wrapped", "SiglipVisionModel")()


FAMILY = Family(
    name="siglip",
    model_types=("siglip_vision_model", "siglip"),
    vision_class=_vision_class,
    has_cls=False,
    final_norm="post_layernorm",
    pooling_head=("head",),
    file_prefix="vision_model.",
    not_tower=(
        "text_model.",
        "text_adapter.",
        "visual_projection.",
        "logit_scale",
        "logit_bias",
    ),
    image_text_class=in_transformers("SiglipModel"),
    image_text_tensors=("logit_bias",),
    mean=HALF_MEAN,
    std=HALF_STD,
    shapes={
        "google/siglip-base-patch16-224": {**B, "image_size": 224},
        "google/siglip-so400m-patch14-384": {
            **SO400M,
            "image_size": 384,
            "patch_size": 14,
        },
        "google/siglip2-base-patch16-224": {**B, "image_size": 224},
        "google/siglip2-so400m-patch14-224": {
            **SO400M,
            "image_size": 224,
            "patch_size": 14,
        },
        "google/siglip2-so400m-patch14-384": {
            **SO400M,
            "image_size": 384,
            "patch_size": 14,
        },
    },
)
