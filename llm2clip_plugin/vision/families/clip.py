"""OpenAI CLIP, with OpenCLIP's models that are published as CLIP on the Hub, and two others of its
architecture.

MetaCLIP 2 has another text tower, so its image tower runs wherever CLIP's does. OpenVision lacks
the norm before the blocks, and pools the norm of the patches' mean.
"""

import functools
from dataclasses import replace
from typing import Any

from llm2clip_plugin.vision.families import (
    BASE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    Family,
    TowerCode,
    in_module,
    in_transformers,
)

B = {**BASE, "intermediate_size": 3072, "hidden_act": "quick_gelu", "image_size": 224}
L = {**LARGE, "intermediate_size": 4096, "hidden_act": "quick_gelu", "patch_size": 14}
H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
}
G = {
    "hidden_size": 1664,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "intermediate_size": 8192,
}
OPENVISION = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}


@functools.lru_cache(maxsize=1)
def _metaclip2() -> Any:
    import transformers

    if hasattr(transformers, "MetaClip2VisionModel"):
        return transformers.MetaClip2VisionModel

    class MetaClip2VisionConfig(transformers.CLIPVisionConfig):
        """CLIP's, under the Hub's type."""

        model_type = "metaclip_2_vision_model"

        @classmethod
        def from_pretrained(cls, directory, **kwargs):
            """The vision model's own configuration, or its part of an image-text model's."""
            fields, rest = cls.get_config_dict(directory, **kwargs)
            return cls.from_dict(fields.get("vision_config", fields), **rest)

    class MetaClip2VisionModel(transformers.CLIPVisionModel):
        """CLIP's tower in versions of transformers without MetaCLIP 2, such as LLaVA's."""

        config_class = MetaClip2VisionConfig

    return MetaClip2VisionModel


def _metaclip2_image_text() -> Any:
    import transformers

    return getattr(transformers, "MetaClip2Model", transformers.CLIPModel)


CLIP = Family(
    name="clip",
    model_types=("clip_vision_model", "clip"),
    vision_class=in_transformers("CLIPVisionModel"),
    has_cls=True,
    embeddings=("embeddings", "pre_layrnorm"),  # sic, on the Hub
    final_norm="post_layernorm",
    last_state_is_normed=False,  # only the pooled class token is
    file_prefix="vision_model.",
    not_tower=(
        "text_model.",
        "text_projection.",
        "visual_projection.",
        "text_adapter.",
        "logit_scale",
    ),
    image_text_class=in_transformers("CLIPModel"),
    scale=100.0,
    image_text_tensors=("visual_projection.weight",),
    shapes={
        "openai/clip-vit-base-patch32": {**B, "patch_size": 32},
        "openai/clip-vit-base-patch16": {**B, "patch_size": 16},
        "openai/clip-vit-large-patch14": {**L, "image_size": 224},
        "openai/clip-vit-large-patch14-336": {**L, "image_size": 336},
    },
)
FAMILY = [
    CLIP,
    replace(
        CLIP,
        name="metaclip2",
        model_types=("metaclip_2_vision_model", "metaclip_2"),
        vision_class=_metaclip2,
        image_text_class=_metaclip2_image_text,
        opens_as="clip_vision_model",
        shapes={
            "facebook/metaclip-2-worldwide-huge-quickgelu": {
                **H,
                "image_size": 224,
                "patch_size": 14,
            },
            "facebook/metaclip-2-worldwide-huge-378": {
                **H,
                "image_size": 378,
                "patch_size": 14,
                "hidden_act": "gelu",
            },
            "facebook/metaclip-2-worldwide-giant-378": {
                **G,
                "image_size": 378,
                "patch_size": 14,
                "hidden_act": "gelu",
            },
        },
    ),
    replace(
        CLIP,
        name="openvision",
        model_types=("llm2clip_openvision",),
        vision_class=in_module("llm2clip_plugin.vision.wrapped", "OpenVisionModel"),
        embeddings=("embeddings",),
        not_tower=(),
        image_text_class=None,
        image_text_tensors=(),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        code=TowerCode(
            file="wrapped", config="OpenVisionConfig", model="OpenVisionModel"
        ),
        shapes={
            "UCSC-VLAA/openvision-vit-base-patch16-224": {
                **B,
                **OPENVISION,
                "patch_size": 16,
            },
            "UCSC-VLAA/openvision-vit-large-patch14-224": {
                **L,
                **OPENVISION,
                "image_size": 224,
            },
            "UCSC-VLAA/openvision-vit-large-patch14-336": {
                **L,
                **OPENVISION,
                "image_size": 336,
            },
        },
    ),
]
