"""OpenVision: CLIP's architecture without the norm before the blocks; the mean of the patches, normed, is pooled.

It runs in LLaVA's pinned environment too.
"""

from typing import Any

from llm2clip_plugin.vision.family import BASE, IMAGENET_MEAN, IMAGENET_STD, LARGE, Family


def _vision_class() -> Any:
    from llm2clip_plugin.vision.standalone.openvision import OpenVisionModel

    return OpenVisionModel


ALL = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
B = {**BASE, **ALL, "intermediate_size": 3072}
L = {**LARGE, **ALL, "intermediate_size": 4096, "patch_size": 14}

FAMILY = Family(
    name="openvision",
    model_types=("llm2clip_openvision",),
    vision_class=_vision_class,
    has_cls=True,
    positions="embeddings.position_embedding.weight",
    blocks="encoder.layers",
    embeddings=("embeddings",),
    final_norm="post_layernorm",
    last_state_is_normed=False,
    file_prefix="vision_model.",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    shapes={
        "UCSC-VLAA/openvision-vit-base-patch16-224": {**B, "image_size": 224, "patch_size": 16},
        "UCSC-VLAA/openvision-vit-large-patch14-224": {**L, "image_size": 224},
        "UCSC-VLAA/openvision-vit-large-patch14-336": {**L, "image_size": 336},
    },
)
