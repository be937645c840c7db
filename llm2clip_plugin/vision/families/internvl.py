"""InternViT, the tower of InternVL (transformers 5): a class token, layer scale, no norm after
the blocks."""

from llm2clip_plugin.vision.families import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    Family,
    wrapped,
)

SIZE = {"image_size": 448, "patch_size": 14}
INTERN_VIT_6B = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}

FAMILY = Family(
    name="internvl",
    model_types=("internvl_vision",),
    vision_class=wrapped(
        "InternvlTower",
        of="InternVLVisionModel",
        title="InternViT",
        since="5",
        config="InternvlTowerConfig",
    ),
    has_cls=True,
    positions="embeddings.position_embeddings",
    blocks="encoder.layer",
    final_norm="layernorm",  # the identity in released models
    never_trained=("embeddings.mask_token",),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    needs="transformers>=5",
    opens_as="internvl_vision",
    shapes={
        "OpenGVLab/InternViT-300M-448px-V2_5": {
            **LARGE,
            **SIZE,
            "intermediate_size": 4096,
            "attention_bias": True,
        },
        "OpenGVLab/InternViT-6B-448px-V2_5": {**INTERN_VIT_6B, **SIZE},
    },
)
