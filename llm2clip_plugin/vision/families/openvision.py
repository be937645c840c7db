"""OpenVision: CLIP's architecture without the norm before the blocks; the norm of the patches' mean is pooled."""

from llm2clip_plugin.vision.families import BASE, IMAGENET_MEAN, IMAGENET_STD, LARGE, Family, in_module

ALL = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
B = {**BASE, **ALL, "intermediate_size": 3072}
L = {**LARGE, **ALL, "intermediate_size": 4096, "patch_size": 14}

FAMILY = Family(
    name="openvision",
    model_types=("llm2clip_openvision",),
    vision_class=in_module("llm2clip_plugin.vision.wrapped", "OpenVisionModel"),
    has_cls=True,
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
